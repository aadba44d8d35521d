"""Runs lives, many in one launch of ranks, and says of each what was wrong."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from tests.helpers.harness import RankError, run_cases
from tests.lives.actions import Life
from tests.lives.compare import differences
from tests.lives.draw import draw
from tests.lives.seen import Seen
from tests.lives.telling import tell

SECONDS = 60.0  # of one life


def judge(lives: Sequence[Life]) -> dict[int, list[str]]:
    """Seed -> what is wrong with its life, empty = nothing; lives of equally many ranks share a launch."""
    told = {life.seed: tell(life) for life in lives}
    found: dict[int, list[str]] = {}
    for engine, ranks in sorted({(life.setting.engine, life.setting.ranks) for life in lives}):
        mine = [told[life.seed][0] for life in lives if (life.setting.engine, life.setting.ranks) == (engine, ranks)]
        results = run_cases(_live(engine), ranks, [(life,) for life in mine], timeout=SECONDS)
        for life in mine:
            try:
                found[life.seed] = differences(life, told[life.seed][1], results[life,])
            except RankError as error:
                found[life.seed] = str(error).splitlines()
    return found


def _live(engine: str) -> Callable[[Life], list[Seen]]:
    if engine == "deepspeed":
        from tests.lives.deepspeed_life import live
    else:
        from tests.lives.megatron_life import live
    return live


def story(life: Life, found: Sequence[str]) -> str:
    """For a person: what happened, what was wrong, and how to see it again."""
    legal = tell(life)[0]
    return "\n".join(
        [
            f"seed {life.seed}: {legal.setting}",
            *(f"  {number}. {action}" for number, action in enumerate(legal.actions, 1)),
            *found,
            f"once more: python -m tests.lives {life.seed}",
        ]
    )


def shrink(life: Life, seconds: float) -> Life:
    """The life with fewer actions that still fails; gives up after so many seconds."""
    limit, position = time.monotonic() + seconds, len(life.actions)
    while position > 0 and time.monotonic() < limit:
        position -= 1
        shorter = dataclasses.replace(life, actions=life.actions[:position] + life.actions[position + 1 :])
        if judge([shorter])[life.seed]:
            life, position = shorter, min(position, len(shorter.actions))
    return life


def run_seeds(seeds: Sequence[int]) -> dict[int, str]:
    """Seed -> the story of its life where it failed, else ""."""
    lives = [draw(seed) for seed in seeds]
    found = judge(lives)
    return {life.seed: story(life, found[life.seed]) if found[life.seed] else "" for life in lives}
