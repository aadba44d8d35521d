"""Blocks of a parameter over which an optimizer computes a statistic, and their views in a range of it.

Adam-mini has one number per block (a head, an output neuron, a token), LAMB one per parameter. All such blocks are
periodic in the flat (row-major) index, so a few integers describe them. Sums over any range are sums over a few strided
views; no index tensor of the range's size exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class BlockView(NamedTuple):
    """Elements [offset, offset + repetitions * steps * width) of a range: `repetitions` periods of `steps` steps.

    `first`: index of the first step within a period. Step first + j has `width` elements in each repetition.
    """

    offset: int
    repetitions: int
    first: int
    steps: int
    width: int

    def of(self, flat: Tensor) -> Tensor:
        """View these elements of the 1-D range `flat` as (repetitions, steps, width), without a copy."""
        count = self.repetitions * self.steps * self.width
        return flat[self.offset : self.offset + count].view(self.repetitions, self.steps, self.width)


@dataclass(frozen=True)
class Blocks:
    """A repeating pattern of blocks over the flat index of one parameter.

    Element i is in step `(i // inner) mod steps`. Consecutive steps form a block; later repetitions of the pattern
    belong to the same blocks. Rows of an `nn.Linear`: `inner` is the number of columns, one repetition. Columns
    (`Conv1D`): `inner` is 1, every row is a repetition. One block: `whole`.

    inner: elements per step, >= 1.
    widths: (steps per block >= 1, number of such blocks), in the order of the flat index.
    """

    inner: int
    widths: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if self.inner < 1 or not self.widths or any(width < 1 or count < 1 for width, count in self.widths):
            raise ValueError(f"blocks need inner, widths and counts >= 1, not inner={self.inner}, {self.widths!r}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Blocks:
        """One block for the parameter."""
        return cls(max(1, math.prod(shape)), ((1, 1),))

    @classmethod
    def rows(cls, shape: Sequence[int]) -> Blocks:
        """One block per index of all dimensions but the last: output neurons of an `nn.Linear`, tokens, experts'."""
        inner = max(1, shape[-1])
        return cls(inner, ((1, max(1, math.prod(shape[:-1]))),))

    @classmethod
    def elements(cls, shape: Sequence[int]) -> Blocks:
        """One block per element."""
        return cls(1, ((1, max(1, math.prod(shape))),))

    @property
    def count(self) -> int:
        """Number of blocks."""
        return sum(count for _, count in self.widths)

    @property
    def steps(self) -> int:
        """Number of steps in one repetition."""
        return sum(width * count for width, count in self.widths)

    @cached_property
    def of_step(self) -> Tensor:
        """Block of each step, int64 (steps,), on the CPU."""
        widths = torch.cat([torch.full((count,), width, device="cpu") for width, count in self.widths])
        return torch.repeat_interleave(torch.arange(self.count, device="cpu"), widths)

    def sizes(self, numel: int) -> Tensor:
        """Return the elements of each block in a parameter of `numel` elements, float64 (count,)."""
        return self.counted(0, numel)

    def counted(self, start: int, numel: int) -> Tensor:
        """Return how many of the elements [start, start + numel) are in each block, float64 (count,)."""
        result = torch.zeros(self.count, dtype=torch.float64, device="cpu")
        for view in self.views(start, numel):
            each = result.new_full((view.steps,), float(view.repetitions * view.width))
            result.index_add_(0, self.of_step[view.first : view.first + view.steps], each)
        return result

    def touched(self, start: int, numel: int) -> tuple[int, int]:
        """Return (first block, number of blocks) of elements [start, start + numel); numel >= 1."""
        first, last = start // self.inner, (start + numel - 1) // self.inner
        if first // self.steps != last // self.steps:
            return 0, self.count
        low, high = int(self.of_step[first % self.steps]), int(self.of_step[last % self.steps])
        return low, high - low + 1

    def views(self, start: int, numel: int) -> Iterator[BlockView]:
        """Yield at most five views that cover elements [start, start + numel) once; offsets are relative to start."""
        at, end, period = start, start + numel, self.inner * self.steps
        while at < end:
            step, inside = at // self.inner % self.steps, at % self.inner
            if inside or end - at < self.inner:
                view = BlockView(at - start, 1, step, 1, min(self.inner - inside, end - at))
            elif step == 0 and end - at >= period:
                view = BlockView(at - start, (end - at) // period, 0, self.steps, self.inner)
            else:
                view = BlockView(at - start, 1, step, min(self.steps - step, (end - at) // self.inner), self.inner)
            yield view
            at += view.repetitions * view.steps * view.width


LONGEST = 4096
"""Number of squares to add in float32; longer runs are added in float64."""
NARROW = 16
"""Width of a step below which repetitions of the pattern are added in float32 too."""


def step_squares(view: Tensor) -> Tensor:
    """Return the sum of squares of each step, float64 (steps,), of a float32 view (repetitions, steps, width).

    Adds runs of at most LONGEST in float32 (error about 1e-7), as fast as reading them, and their sums in float64,
    which is many times slower on CPUs.
    """
    repetitions, steps, width = view.shape
    most = LONGEST // NARROW if width < NARROW else 1
    for dim, size, longest in ((0, repetitions, most), (2, width, LONGEST)):
        if size > longest and size % longest:
            whole = size - size % longest
            return step_squares(view.narrow(dim, 0, whole)) + step_squares(view.narrow(dim, whole, size - whole))
    runs = view.view(-1, min(repetitions, most), steps, max(1, width // LONGEST), min(width, LONGEST))
    squares: Tensor = torch.linalg.vector_norm(runs, dim=(1, 4)).double().square_()
    return squares.sum((0, 2))
