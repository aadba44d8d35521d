"""ZeRO stage 3: which parameters are gathered, how often, and how many are gathered at the same time.

Follows DeepSpeed's runtime/zero/partitioned_param_coordinator.py: modules run in the order of a traced step. After its
use a module's parameters are released, unless the trace uses them again within `max_reuse_distance` elements.
Prefetching gathers up to `prefetch_bucket_size` elements ahead, within `max_live_parameters`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from mols_ds.apps.plan.optimizers import Weight


class Gathered(NamedTuple):
    """Gathers of one micro-step. elements: sum of all gathers; calls: least number; live: most elements at a time."""

    elements: int
    calls: int
    live: int


def gathered(
    weights: Sequence[Weight], *, reuse: int, prefetch: int, most: int, checkpointing: bool, layers: int
) -> Gathered:
    """Simulate the gathers of one micro-step. weights: the partitioned ones in order of use. With checkpointing, the
    forward of a layer runs again before its backward. Approximation: one module per parameter."""
    order = _trace(weights, checkpointing, layers)
    following = _next_use(order, weights)
    everything = sum(weight.numel for weight in weights)
    live: set[int] = set()
    total = calls = peak = held = 0
    for at, index in enumerate(order):
        if index not in live:
            live.add(index)
            held += weights[index].numel
            total += weights[index].numel
            calls += 1
        peak = max(peak, held + min(prefetch, max(0, most - held), everything - held))
        if following[at] >= reuse:
            live.remove(index)
            held -= weights[index].numel
    return Gathered(total, calls, peak)


def _trace(weights: Sequence[Weight], checkpointing: bool, layers: int) -> list[int]:
    """Return parameter indices in the order in which forward and backward use them."""
    forward = list(range(len(weights)))
    if not checkpointing:
        return forward + forward[::-1]
    backward: list[int] = []
    for block in reversed(_blocks(weights, layers)):
        backward += block if len(block) > 1 else []
        backward += block[::-1]
    return forward + backward


def _blocks(weights: Sequence[Weight], layers: int) -> list[list[int]]:
    """Group consecutive parameters of a decoder layer (`...layers.7....`, `...h.7....`); others are alone."""

    def block(number: int) -> str | int:
        parts = [part for part in weights[number].name.split(".") if part.isdigit()]
        return parts[0] if parts and layers > 1 else number

    return [list(numbers) for _, numbers in itertools.groupby(range(len(weights)), block)]


def _next_use(order: Sequence[int], weights: Sequence[Weight]) -> list[float]:
    """Return, for each position, the elements used before the next use of the same parameter; inf if there is none."""
    before = list(itertools.accumulate((weights[index].numel for index in order), initial=0))
    result, seen = [math.inf] * len(order), dict[int, int]()
    for at in range(len(order) - 1, -1, -1):
        index = order[at]
        if index in seen:
            result[at] = before[seen[index]] - before[at + 1]
        seen[index] = at
    return result
