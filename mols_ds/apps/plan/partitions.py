"""How DeepSpeed partitions the flat parameters over ranks and into buckets, at ZeRO stages 1 and 2."""

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
    """One rank's partition of ZeRO's flat buffer. whole: elements of all parameters that it owns at least partly."""

    flat: int
    size: int
    owned: int
    whole: int
    rank: int


def partitions(weights: Sequence[Weight], ranks: int) -> list[Partition]:
    """Return all ranks' partitions (stage_1_and_2.py: 2 elements alignment a rank, `get_data_parallel_partitions`)."""
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
    """Fill buckets in order. A parameter that does not fit starts the next bucket."""
    result: list[list[Weight]] = []
    held = 0
    for weight in weights:
        if not result or held + weight.numel > size:
            result.append([])
            held = 0
        result[-1].append(weight)
        held += weight.numel
    return result
