"""The short form of `python -m tests.fuzz`: at least 10,000 cases, none of which fails. The same cases every time.

`make test` runs a twentieth of them, the rest of `make test-all` a quarter.
"""

from __future__ import annotations

import pytest

from tests.tools.fuzz.common import Outcome, Target, fuzz
from tests.tools.fuzz.run import TARGETS, table

LEAST = 10_000
SHARES = {20: "quick", 4: "all"}
FEWEST = 10
OUTCOMES: list[Outcome] = []


@pytest.mark.parametrize("share", [pytest.param(n, marks=pytest.mark.tier(tier)) for n, tier in SHARES.items()])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_part_of_the_cases(target: Target, share: int) -> None:
    outcome = fuzz(target, max(FEWEST, target.examples // share))
    assert not outcome.failure, outcome.failure
    assert outcome.cases


@pytest.mark.tier("full")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_only_documented_errors(target: object) -> None:
    assert hasattr(target, "examples")
    outcome = fuzz(target, target.examples)  # type: ignore[arg-type]
    OUTCOMES.append(outcome)
    assert not outcome.failure, outcome.failure
    assert outcome.counts["accepted"], "nothing was ever accepted: the cases are all wrong"
    assert outcome.cases >= 0.9 * target.examples, "hypothesis ran out of cases"


@pytest.mark.tier("full")
def test_enough_cases() -> None:
    if len(OUTCOMES) < len(TARGETS):
        pytest.skip("not all targets were run")
    print(table(OUTCOMES))
    assert sum(outcome.cases for outcome in OUTCOMES) >= LEAST
