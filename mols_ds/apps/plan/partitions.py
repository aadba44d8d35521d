"""How DeepSpeed cuts the flat parameters over ranks, and into buckets, at ZeRO stages 1 and 2."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mols_ds.apps.plan.optimizers import Weight
from mols_ds.apps.plan.parts import up


def numel_of(weights: Sequence[Weight]) -> int:
    return sum(weight.numel for weight in weights)


@dataclass(frozen=True)
class Partition:
    """One rank's part of ZeRO's flat buffer. whole: elements of the parameters of which it owns any part."""

    flat: int
    size: int
    owned: int
    whole: int
    rank: int


def partitions(weights: Sequence[Weight], ranks: int) -> list[Partition]:
    """Of every rank (stage_1_and_2.py: alignment of 2 elements a rank, `get_data_parallel_partitions`)."""
    edges = list(itertools.accumulate((w.numel for w in weights), initial=0))
    flat = up(edges[-1], 2 * ranks)
    size = flat // ranks
    result = []
    for rank in range(ranks):
        low, high = min(rank * size, edges[-1]), min((rank + 1) * size, edges[-1])
        first, last = bisect.bisect_right(edges, low) - 1, bisect.bisect_left(edges, high)
        whole = edges[last] - edges[first] if high > low else 0
        result.append(Partition(flat, size, high - low, whole, rank))
    return result


def buckets(weights: Sequence[Weight], size: int) -> list[list[Weight]]:
    """The buckets as they are filled: a parameter that does not fit any more begins the next one."""
    result: list[list[Weight]] = []
    held = 0
    for weight in weights:
        if not result or held + weight.numel > size:
            result.append([])
            held = 0
        result[-1].append(weight)
        held += weight.numel
    return result
