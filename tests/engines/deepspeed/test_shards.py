"""Owned ranges of inner tensors: neighbours are read as one, and each element goes to its place."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mols_ds.core.ranges import ParamRange
from mols_ds.engines.deepspeed.parallel.base import Place
from mols_ds.engines.deepspeed.zero_shards import ZeroShards

FIRST, SECOND, ALIEN = torch.arange(10.0), torch.arange(100.0, 106.0), torch.zeros(3)
PARAMETERS = {
    name: nn.Parameter(torch.zeros(numel)) for name, numel in {"a": 3, "b": 9, "c": 2, "d": 4, "e": 2}.items()
}


class Fixed(ZeroShards):
    """Two tensors of five parameters."""

    def _collect(self) -> None:
        a, b, c, d, e = PARAMETERS.values()
        first = [
            self._range(a, 0, 3, 0),
            self._range(b, 5, 7, 3),  # a neighbour, from the middle of its parameter
            self._range(c, 0, 8, 6),  # behind one element of padding; the parameter ends before the tensor's part does
        ]
        self._add(FIRST, FIRST.numel(), first)
        self._add(SECOND, SECOND.numel(), [self._range(d, 0, 4, 0), self._range(d, 4, 8, 4), self._range(e, 0, 2, 4)])

    def read(self) -> Iterator[tuple[int, Tensor]]:
        for tensor in self.tensors:
            yield from self.owned_parts(tensor, tensor)

    def discard(self) -> None:
        pass


def shards(uncounted: str = "") -> Fixed:
    places = {p: Place(ParamRange(name, 0, p.numel()), name != uncounted) for name, p in PARAMETERS.items()}
    return Fixed(SimpleNamespace(optimizer=None), places)


def test_neighbours_are_one_range_and_padding_parts_them() -> None:
    mine = shards()
    assert [[tuple(item) for item in ranges] for ranges in mine.ranges] == [
        [("a", 0, 0, 3), ("b", 5, 3, 2), ("c", 0, 6, 2)],
        [("d", 0, 0, 4), ("e", 0, 4, 2)],
    ]
    found = [(offset, gradient.tolist()) for offset, gradient in mine.read()]
    assert found == [(0, [0, 1, 2, 3, 4]), (5, [6, 7]), (7, [100, 101, 102, 103, 104, 105])]
    assert list(mine.owned_parts(ALIEN, None)) == []
    with pytest.raises(AssertionError, match="no gradient"):
        list(mine.owned_parts(FIRST, None))


def test_what_another_rank_counts_keeps_its_place_in_the_tensor() -> None:
    mine = shards(uncounted="a")
    assert [(offset, gradient.tolist()) for offset, gradient in mine.read()] == [
        (0, [3, 4]),
        (2, [6, 7]),
        (4, [100, 101, 102, 103, 104, 105]),
    ]
    assert [tuple(item) for item in mine.accumulated][:2] == [("b", 5, 0, 2), ("c", 0, 2, 2)]
