"""Random legal lives of a run are as a plain single-process twin tells them. Seeds: `python -m tests.lives SEED`."""

from __future__ import annotations

import functools

import pytest

from tests.helpers.tiers import Cases
from tests.lives.draw import KINDS, draw
from tests.lives.running import run_seeds

pytestmark = pytest.mark.distributed

FEW, ALL = 20, 200
SEEDS = Cases(range(ALL), full=lambda seed: seed >= FEW)


@functools.cache
def stories() -> dict[int, str]:
    seeds = SEEDS.wanted
    print(f"seeds {seeds[0]} to {seeds[-1]}, {len(seeds)} lives")
    return run_seeds(seeds)


@SEEDS.parametrize("seed")
def test_a_life_is_as_the_twin_tells(seed: int) -> None:
    story = stories()[seed]
    assert not story, story


@pytest.mark.tier("all")
def test_the_few_lives_have_every_kind_of_engine() -> None:
    assert len({str(KINDS[seed % len(KINDS)]) for seed in range(FEW)}) == len({str(kind) for kind in KINDS})
    assert [draw(seed) for seed in range(3)] == [draw(seed) for seed in range(3)]
