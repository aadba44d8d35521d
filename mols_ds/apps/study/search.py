"""Random search over multipliers in a trust region: what could be gained at most, at the price of many runs.

Every proposal draws each multiplier log-uniformly within a box around the best point so far, in eighths of an octave.
The box is widened after a success and narrowed after `PATIENCE` failures in a row. A proposal that is not below the
best point on the first tuning seed is dropped, and else runs on the next one, so most proposals cost one run. In the
manner of the search per module of arXiv 2512.22382.

The search keeps no state: it is repeated from the finished runs, which determine the next one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mols_ds.apps.study.spec import Values

WIDTH, NARROWEST, WIDEST = 1.0, 0.25, 2.0
"""Half the box, in octaves: at the start, at least, at most."""
FACTOR, PATIENCE = 1.5, 4
STEPS = 8
"""Steps of a multiplier in an octave."""
MOST = 100
"""Proposals for each run of the budget, those that repeat a point included."""
PREFIX = "mols.fixed_alphas."


class Searched(NamedTuple):
    """State of a search.

    wanted: settings and seed of the next run; None at the end of the budget. best: settings with the lowest mean loss;
    None before the first point is complete. losses: mean loss of every point that ran on all seeds. spent: runs so far.
    """

    wanted: tuple[Values, int] | None
    best: Values | None
    losses: dict[Values, float]
    spent: int


def search(
    start: Values, groups: Sequence[str], seeds: Sequence[int], runs: int, loss: Callable[[Values, int], float | None]
) -> Searched:
    """Repeat a search from its finished runs.

    Args:
        start: first point: the rate, and multipliers as "mols.fixed_alphas.GROUP" (1 for a group that is not named).
        groups: groups whose multipliers vary.
        seeds: tuning seeds, in the order in which a point runs.
        runs: budget.
        loss: final loss of a finished run (infinite if it diverged), None for one that is not finished.
    """
    point = {name: value for name, value in start if not name.startswith(PREFIX)}
    point |= {PREFIX + group: float(dict(start).get(PREFIX + group, 1.0)) for group in groups}
    best: Values | None = None
    at_best: list[float] = []
    losses: dict[Values, float] = {}
    tried: set[Values] = set()
    width, failures, spent, number = WIDTH, 0, 0, 0
    while number < MOST * runs:
        values = tuple(sorted((point if best is None else _proposal(dict(best), width, number)).items()))
        number += 1
        if values in tried:
            continue
        tried.add(values)
        found: list[float] = []
        for seed in seeds:
            if spent == runs:
                return Searched(None, best, losses, spent)
            value = loss(values, seed)
            if value is None:
                return Searched((values, seed), best, losses, spent)
            spent += 1
            found.append(value)
            if best is not None and math.fsum(found) >= math.fsum(at_best[: len(found)]):
                break
        if len(found) == len(seeds):
            losses[values] = math.fsum(found) / len(found)
        if len(found) == len(seeds) and (best is None or math.fsum(found) < math.fsum(at_best)):
            width = width if best is None else min(WIDEST, width * FACTOR)
            best, at_best, failures = values, found, 0
            continue
        failures += 1
        if failures == PATIENCE:
            width, failures = max(NARROWEST, width / FACTOR), 0
    return Searched(None, best, losses, spent)  # every point of the box has been tried


def _proposal(best: Mapping[str, float | int | str], width: float, number: int) -> dict[str, float | int | str]:
    """Draw proposal `number` around the best point."""
    draw = random.Random(number)
    proposed = dict(best)
    for name in sorted(best):
        if name.startswith(PREFIX):
            octave = math.log2(float(best[name])) + draw.uniform(-width, width)
            proposed[name] = float(f"{2 ** (round(octave * STEPS) / STEPS):.5g}")
    return proposed
