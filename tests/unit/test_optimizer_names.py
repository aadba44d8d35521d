"""Names of optimizers in a config, and their aliases."""

from __future__ import annotations

import pytest

from mols_ds.optim.catalog import OPTIMIZERS, find


@pytest.mark.parametrize(
    ("given", "name"),
    [
        *((name.lower(), name) for name in OPTIMIZERS),
        ("8bit-Adam", "Adam8bit"),
        ("AdamW8bit", "Adam8bit"),
        ("Adam-mini", "AdamMini"),
        ("adam_mini", "AdamMini"),
        ("SGD-SaI", "SGDSaI"),
    ],
)
def test_names_and_aliases(given: str, name: str) -> None:
    entry = find(given)
    assert entry is not None and entry.name == name
