"""Whether the ranges of all ranks cover each element of each parameter once, and how even the ranks' shares are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mols_ds.core.group_stats import COLUMNS, NoiseFloor
from mols_ds.core.groups import ElementLayout, GroupTable
from mols_ds.core.local_stats import LocalStats
from mols_ds.core.ranges import ShardRange

IntArray = npt.NDArray[np.int64]


class Tally(NamedTuple):
    """What was counted over all ranks.

    pieces: ranges of parameters that ranks own, in all.
    least, mean, most: owned elements of a rank; `most` is at rank `heaviest`.
    balance: the most that a rank owns over the mean of the ranks of its pipeline stage (of all ranks without stages),
        for the stage where that is worst; 1 is even. Stages differ, since one has the embedding and one the head.
    faults: elements that are not counted exactly once, in words; empty if there are none.
    """

    ranks: int
    elements: int
    pieces: int
    least: int
    mean: float
    most: int
    heaviest: int
    balance: float
    faults: tuple[str, ...]


MOST_FAULTS = 5
NO_TILES: Mapping[str, int] = MappingProxyType({})


class Count:
    """Takes each rank's ranges in turn and checks them against the group table at the end.

    They go through the product's `LocalStats` too: its segments and their layouts give the element counts of the group
    sums.
    """

    def __init__(self, table: GroupTable) -> None:
        self.table = table
        self._number = {name: i for i, name in enumerate(table.shapes)}
        self._sizes = [math.prod(shape) for shape in table.shapes.values()]
        self._rows: list[IntArray] = []
        self._owned: list[int] = []
        self._stages: list[int] = []
        self._groups: dict[str, int] = {}
        self._faults: list[str] = []

    def add(self, ranges: Sequence[ShardRange], tiles: Mapping[str, int] = NO_TILES, stage: int = 0) -> None:
        """The ranges of the next rank in its accumulators.

        tiles: parameter -> elements of the tiles before this rank's, for those that are cut into tiles along another
            dimension than the first. Their ranges are of the tile, which is enough for the statistics (all of
            such a parameter is one group), and tiles must not be taken for one another here.
        stage: number of the rank's pipeline stage.
        """
        rank = len(self._owned)
        elements = self.elements(ranges)
        offset = 0
        for item in ranges:
            if item.offset != offset and len(self._faults) < MOST_FAULTS:
                self._faults.append(f"rank {rank}: {item.name} lies at {item.offset} of its accumulators, not {offset}")
            offset += item.numel
        self._rows.append(
            np.array(
                [(self._number[r.name], r.start + tiles.get(r.name, 0), r.numel) for r in ranges], dtype=np.int64
            ).reshape(-1, 3)
        )
        self._owned.append(elements.numel)
        self._stages.append(stage)
        for layout, start, _, numel, _ in elements.segments():
            for group, count in self._counts(layout, start, numel):
                self._groups[group] = self._groups.get(group, 0) + count

    def elements(self, ranges: Sequence[ShardRange]) -> LocalStats:
        """State of a rank with these ranges, without memory."""
        return LocalStats(ranges, self.table.layouts, list(self.table.elements), torch.device("meta"))

    def sum_of(self, ranges: Sequence[ShardRange]) -> dict[str, int]:
        """Elements of each group that `GroupSums` itself counts in one rank's ranges.

        Through `LocalStats.add_squares` and the layouts' views, as a calibration from Adam's moments goes; every
        value is 1, held once and repeated by a stride of 0. Time grows with the elements, memory does not.
        """
        elements = self.elements(ranges)
        elements.open_squares(NoiseFloor(1.0, 0.0))
        one = torch.ones(1)
        for index, item in enumerate(ranges):
            values = one.expand(item.numel)
            elements.add_squares(index, values, values)
        sums = elements.take_squares()
        totals = sums.table[:, COLUMNS.index("total")].tolist()
        return {group: int(total) for group, total in zip(sums.groups, totals, strict=True) if total}

    def expected_sum(self, ranges: Sequence[ShardRange]) -> dict[str, int]:
        """The same by the integer arithmetic of the layouts."""
        found: dict[str, int] = dict.fromkeys(self.table.elements, 0)
        for item in ranges:
            for group, count in self.table.layouts[item.name].counts(item.start, item.numel).items():
                found[group] += count
        return {group: count for group, count in found.items() if count}

    def _counts(self, layout: ElementLayout, start: int, numel: int) -> Sequence[tuple[str, int]]:
        if len(layout.pattern) == 1:  # most segments: said without the arithmetic of a pattern
            return ((layout.pattern[0][1], numel),)
        return tuple(layout.counts(start, numel).items())

    def finish(self) -> Tally:
        """The tally of all ranks that were added."""
        faults = [*self._faults, *self._coverage(), *_group_faults(self.table.elements, self._groups)]
        owned, stages = np.array(self._owned, dtype=np.int64), np.array(self._stages)
        balances = [float(mine.max() / mine.mean()) for s in np.unique(stages) if (mine := owned[stages == s]).any()]
        return Tally(
            ranks=len(owned),
            elements=sum(self._sizes),
            pieces=sum(len(rows) for rows in self._rows),
            least=int(owned.min()),
            mean=float(owned.mean()),
            most=int(owned.max()),
            heaviest=int(owned.argmax()),
            balance=max(balances, default=math.nan),
            faults=tuple(faults[:MOST_FAULTS]),
        )

    def _coverage(self) -> list[str]:
        """Per parameter: the ranges in the order of their starts must follow each other from 0 to its last element."""
        rows = np.concatenate(self._rows)
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        bounds = np.searchsorted(rows[:, 0], np.arange(len(self._sizes) + 1))
        faults = []
        for name, number in self._number.items():
            mine = rows[bounds[number] : bounds[number + 1]]
            starts, ends = mine[:, 1], mine[:, 1] + mine[:, 2]
            expected = np.concatenate(([0], ends))
            actual = np.concatenate((starts, [self._sizes[number]]))
            if (mine[:, 2] < 1).any():
                faults.append(f"{name}: an empty piece")
            for at in np.flatnonzero(expected != actual)[:1]:
                low, high = sorted((int(expected[at]), int(actual[at])))
                what = "counted by no rank" if actual[at] > expected[at] else "counted more than once"
                faults.append(f"{name}: elements {low:,} to {high:,} are {what}")
        return faults


def _group_faults(expected: Mapping[str, int], counted: Mapping[str, int]) -> list[str]:
    return [
        f"group {group}: {counted.get(group, 0):,} elements counted, {expected.get(group, 0):,} in the model"
        for group in dict.fromkeys((*expected, *counted))
        if counted.get(group, 0) != expected.get(group, 0)
    ]
