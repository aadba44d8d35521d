"""Random valid scenarios of a run match a single-process reference. One seed: `python -m tests.scenarios SEED`."""

from __future__ import annotations

import functools

import pytest

from tests.helpers.tiers import Cases
from tests.scenarios.generate import ENGINES, generate
from tests.scenarios.runner import run_seeds

pytestmark = pytest.mark.distributed

SEEDS_IN_ALL, SEEDS_IN_FULL = 20, 200
SEEDS = Cases(range(SEEDS_IN_FULL), full=lambda seed: seed >= SEEDS_IN_ALL)


@functools.cache
def reports() -> dict[int, str]:
    seeds = SEEDS.wanted
    print(f"seeds {seeds[0]} to {seeds[-1]}, {len(seeds)} scenarios")
    return run_seeds(seeds)


@SEEDS.parametrize("seed")
def test_scenario_matches_reference(seed: int) -> None:
    report = reports()[seed]
    assert not report, report


@pytest.mark.tier("all")
def test_seeds_of_tier_all_cover_every_engine() -> None:
    covered = {str(ENGINES[seed % len(ENGINES)]) for seed in range(SEEDS_IN_ALL)}
    assert covered == {str(engine) for engine in ENGINES}
    assert [generate(seed) for seed in range(3)] == [generate(seed) for seed in range(3)]
