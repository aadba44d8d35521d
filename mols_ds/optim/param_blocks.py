"""Blocks of one parameter over which an optimizer takes a statistic, and how to view them in a range of it.

Adam-mini keeps one number a block (a head, an output neuron, a token), LAMB one a parameter. All such blocks are
periodic in the flat (row-major) index, so a few integers describe them, and sums over any range of the parameter are
sums over a handful of strided views: no index of the range's size is ever made.
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

    `first` is the number of the first step within a period; step first + j has `width` elements in each repetition.
    """

    offset: int
    repetitions: int
    first: int
    steps: int
    width: int

    def of(self, flat: Tensor) -> Tensor:
        """These elements of the 1-D range `flat` as (repetitions, steps, width), without a copy."""
        count = self.repetitions * self.steps * self.width
        return flat[self.offset : self.offset + count].view(self.repetitions, self.steps, self.width)


@dataclass(frozen=True)
class Blocks:
    """A repeating pattern of blocks over the flat index of one parameter.

    Element i lies in step `(i // inner) mod steps`; consecutive steps make a block, and later repetitions of the
    pattern belong to the same blocks. Rows of an `nn.Linear`: `inner` is the number of columns and there is one
    repetition. Columns (`Conv1D`): `inner` is 1 and every row is a repetition. One block: `whole`.

    inner: elements of a step, >= 1.
    widths: (steps of a block >= 1, number of such blocks), in the order of the flat index.
    """

    inner: int
    widths: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if self.inner < 1 or not self.widths or any(width < 1 or count < 1 for width, count in self.widths):
            raise ValueError(f"blocks need inner, widths and counts >= 1, not inner={self.inner}, {self.widths!r}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Blocks:
        """The parameter is one block."""
        return cls(max(1, math.prod(shape)), ((1, 1),))

    @classmethod
    def rows(cls, shape: Sequence[int]) -> Blocks:
        """A block for each index of all dimensions but the last: output neurons of an `nn.Linear`, tokens, experts'."""
        inner = max(1, shape[-1])
        return cls(inner, ((1, max(1, math.prod(shape[:-1]))),))

    @classmethod
    def elements(cls, shape: Sequence[int]) -> Blocks:
        """Each element is a block."""
        return cls(1, ((1, max(1, math.prod(shape))),))

    @property
    def count(self) -> int:
        """Number of blocks of the whole parameter."""
        return sum(count for _, count in self.widths)

    @property
    def steps(self) -> int:
        """Number of steps of one repetition."""
        return sum(width * count for width, count in self.widths)

    @cached_property
    def of_step(self) -> Tensor:
        """Step -> block, int64 (steps,), on the CPU."""
        widths = torch.cat([torch.full((count,), width, device="cpu") for width, count in self.widths])
        return torch.repeat_interleave(torch.arange(self.count, device="cpu"), widths)

    def sizes(self, numel: int) -> Tensor:
        """Elements of each block in a parameter of `numel` elements, float64 (count,)."""
        return self.counted(0, numel)

    def counted(self, start: int, numel: int) -> Tensor:
        """How many of the elements [start, start + numel) lie in each block, float64 (count,)."""
        result = torch.zeros(self.count, dtype=torch.float64, device="cpu")
        for view in self.views(start, numel):
            each = result.new_full((view.steps,), float(view.repetitions * view.width))
            result.index_add_(0, self.of_step[view.first : view.first + view.steps], each)
        return result

    def touched(self, start: int, numel: int) -> tuple[int, int]:
        """(first block, number of blocks) of the range that the elements [start, start + numel) lie in; numel >= 1."""
        first, last = start // self.inner, (start + numel - 1) // self.inner
        if first // self.steps != last // self.steps:
            return 0, self.count
        low, high = int(self.of_step[first % self.steps]), int(self.of_step[last % self.steps])
        return low, high - low + 1

    def views(self, start: int, numel: int) -> Iterator[BlockView]:
        """At most five views that cover the elements [start, start + numel) once, offsets relative to start."""
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
"""Squares that are added in float32; further ones are added in float64."""
NARROW = 16
"""Elements of a step below which the repetitions of the pattern are added in float32 too."""


def step_squares(view: Tensor) -> Tensor:
    """Sum of squares of each step, float64 (steps,), of a float32 view (repetitions, steps, width).

    Runs of at most LONGEST are added in float32 (to some 1e-7 of the sum), which is as fast as reading them, and their
    sums in float64, which on CPUs takes many times as long.
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
