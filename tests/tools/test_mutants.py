"""The tables of mutants match the code: each replaces text that occurs once in its file."""

from __future__ import annotations

import pytest

from tests.scenarios.mutants import SCENARIO_MUTANTS
from tests.tools.mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", [*MUTANTS, *SCENARIO_MUTANTS], ids=lambda mutant: mutant.name)
def test_replaced_text_occurs_once(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text("utf-8").count(mutant.old) == 1
