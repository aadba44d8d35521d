"""The tables of planted bugs match the code: each replaces text that its file has once."""

from __future__ import annotations

import pytest

from tests.lives.mutants import LIVES
from tests.tools.mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", [*MUTANTS, *LIVES], ids=lambda mutant: mutant.name)
def test_its_text_is_in_the_file_once(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text("utf-8").count(mutant.old) == 1
