"""Keep the gradient samples of a few elements: what the 95 % intervals come from."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from mols_ds.core.exponents import Exponents
from mols_ds.core.layout import ElementLayout
from mols_ds.core.ranges import ShardRange
from mols_ds.core.welford import squares_of_one, welford
from mols_ds.errors import MolsCheckpointError

ELEMENTS = 1 << 15
"""Elements of one rank that are kept at most: 4 MiB for up to `CELLS` samples, 8 MiB for more."""
CELLS = 32
PIECE = 1 << 22


class Subsample:
    """Some elements of each group with all their samples. Sample k goes into cell k mod CELLS (mean and squares).

    Attributes:
        positions: int64 (n,) on the CPU, ascending: places in the accumulators.
        rows: int16 (n,) on the CPU: the group of each.
        weights: group row -> elements of this rank for each element that is kept.
        means, squares: one (n,) tensor per cell; squares from the cells' second samples on.
    """

    def __init__(
        self, positions: Tensor, rows: Tensor, weights: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.positions, self.rows, self.weights = positions, rows, list(weights)
        self.dtype = dtype
        self.means: list[Tensor] = []
        self.squares: list[Tensor] = []
        self._sorted: list[int] = positions.tolist()
        self._places = positions.to(device)

    def open(self, count: int) -> None:
        """Begin sample number `count`, from 0."""
        cells = self.means if count < CELLS else self.squares
        if len(cells) <= count % CELLS and count < 2 * CELLS:
            cells.append(torch.zeros(len(self._sorted), dtype=self.dtype, device=self._places.device))

    def add(self, offset: int, gradient: Tensor, scale: float, exponents: Exponents, count: int) -> None:
        """Add gradient * scale for elements [offset, offset + numel) of sample `count`."""
        cell, k = count % CELLS, count // CELLS + 1
        for begin, end, exponent in exponents.parts(offset, gradient.numel()):
            part = self.between(begin, end)
            if part.start == part.stop:
                continue
            value = gradient.index_select(0, self._places[part] - offset).to(self.dtype) * (scale * 2.0**exponent)
            mean = self.means[cell][part]
            if k == 1:
                mean.copy_(value)
            else:
                welford(mean, self.squares[cell][part], value, k, value)

    def close(self, count: int, exponents: Exponents) -> None:
        """End sample `count`."""

    def rescale(self, begin: int, end: int, exponent: int, count: int) -> None:
        """Scale elements whose first non-zero gradient is that of sample `count`, see `Accumulators`."""
        cell, k = count % CELLS, count // CELLS + 1
        part = self.between(begin, end)
        mean = self.means[cell][part].mul_(2.0**exponent)
        if k > 1:
            squares_of_one(mean, self.squares[cell][part], k)

    def between(self, begin: int, end: int) -> slice:
        """Return which of the elements have positions in [begin, end)."""
        return slice(bisect_left(self._sorted, begin), bisect_left(self._sorted, end))

    def stacked(self) -> tuple[Tensor, Tensor | None]:
        """Return the cells' means (C, n), and squared deviations of the cells that have some; None if none has."""
        return torch.stack(self.means), torch.stack(self.squares) if self.squares else None

    def state(self, count: int) -> dict[str, int | Tensor]:
        """Return `count` samples, copied."""
        none = torch.zeros(0, len(self._sorted), dtype=self.dtype, device=self._places.device)
        return {
            "cells": torch.stack(self.means[:count]) if count else none,
            "cell_squares": torch.stack(self.squares[: count - CELLS]) if count > CELLS else none,
        }

    def load(self, state: Mapping[str, object], count: int) -> None:
        """Load a `state` of `count` samples. Raises `MolsCheckpointError` if it does not fit."""
        for key, cells in (("cells", min(count, CELLS)), ("cell_squares", min(max(count - CELLS, 0), CELLS))):
            saved, shape = state[key], (cells, len(self._sorted))
            if not isinstance(saved, Tensor) or saved.shape != shape or saved.dtype != self.dtype:
                raise MolsCheckpointError(f"the accumulators' {key!r} is no {self.dtype} tensor of shape {shape}")
        self.means, self.squares = (
            [row.clone() for row in cast(Tensor, state[key]).to(self._places.device)]
            for key in ("cells", "cell_squares")
        )


def choose(
    owned: Sequence[ShardRange], layouts: Mapping[str, ElementLayout], groups: Sequence[str], limit: int = ELEMENTS
) -> tuple[Tensor, Tensor, list[int]]:
    """Choose elements: the same number of each group, or all of a smaller group; spread evenly over its elements.

    Args:
        owned: this rank's ranges, in the order of the accumulators.
        layouts: parameter name -> layout.
        groups: names; their position is the row.
        limit: largest number of elements in all.

    Returns:
        positions, rows and weights of `Subsample`.
    """
    counts = dict.fromkeys(groups, 0)
    for item in owned:
        for group, count in layouts[item.name].counts(item.start, item.numel).items():
            counts[group] += count
    stride, left = dict[str, int](), limit
    for number, group in enumerate(sorted(counts, key=counts.__getitem__)):
        share = max(1, left // (len(counts) - number))
        stride[group] = _prime(-(-counts[group] // share))
        left -= -(-counts[group] // stride[group])
    seen, row = dict.fromkeys(groups, 0), {group: i for i, group in enumerate(groups)}
    none = torch.zeros(0, dtype=torch.int64, device="cpu")
    found, rows = [none], [none.to(torch.int16)]
    for item in owned:
        for at in range(0, item.numel, PIECE):
            places = torch.arange(item.offset + at, item.offset + min(at + PIECE, item.numel), device="cpu")
            for group, view in layouts[item.name].views(places, item.start + at):
                flat = view.reshape(-1)
                taken = flat[-seen[group] % stride[group] :: stride[group]]
                seen[group] += flat.numel()
                found.append(taken)
                rows.append(torch.full_like(taken, row[group], dtype=torch.int16))
    positions, order = torch.cat(found).sort()
    return positions, torch.cat(rows)[order], [stride[group] for group in groups]


def _prime(least: int) -> int:
    """The smallest prime >= least; 1 for 1 or less. So that few strides share a divisor with the rows of a matrix."""
    if least < 2:
        return 1
    while any(least % divisor == 0 for divisor in range(2, int(least**0.5) + 1)):
        least += 1
    return least
