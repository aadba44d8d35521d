"""Scale small and large gradients by powers of two, so that their squares stay in fp32's range.

In fp32 the square of a number below 2.6e-23 is 0, below 1e-19 it is rounded coarsely, and above 1.8e19 it is infinite.
If the first gradient of a range of elements (a parameter) is outside `UNSCALED`, accumulators hold the range times the
power of two that brings its largest element near 1. That multiplication is exact: results change only where squares
would underflow or overflow.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

UNSCALED = (2.0**-40, 2.0**40)
"""Largest magnitudes of a range without scaling: its squares are 2^46 or more inside fp32's range."""
MAX_EXPONENT = 100
"""Largest exponent: fp32's largest power of two is 2^127."""
UNDECIDED = -(2**15)
"""In a saved state: every gradient of this range was zero so far."""


class Exponents:
    """Exponent of each range of the accumulators, decided at its first non-zero gradient.

    Args:
        edges: starts of the ranges, ascending from 0, then the number of all elements.
    """

    def __init__(self, edges: Sequence[int]) -> None:
        self.edges = list(edges)
        self.undecided = list(range(max(0, len(self.edges) - 1)))
        self._of: dict[int, int] = {}

    def parts(self, offset: int, numel: int) -> Iterator[tuple[int, int, int]]:
        """Yield (begin, end, exponent) of elements [offset, offset + numel), split where the exponent changes."""
        end = offset + numel
        if not self._of:
            yield offset, end, 0
            return
        begin, index = offset, max(0, bisect_right(self.edges, offset) - 1)
        while begin < end:
            exponent = self._of.get(index, 0)
            while self.edges[index + 1] < end and self._of.get(index + 1, 0) == exponent:
                index += 1
            stop = min(end, self.edges[index + 1])
            yield begin, stop, exponent
            begin, index = stop, index + 1

    def decide(self, mean: Tensor) -> list[tuple[int, int, int]]:
        """Decide the ranges whose mean is no longer zero.

        Args:
            mean: of all elements, before scaling. Every undecided range was zero before this sample.

        Returns:
            (begin, end, exponent) of the ranges that are scaled.
        """
        waiting = [i for i in self.undecided if self.edges[i] < self.edges[i + 1]]
        if not waiting:
            return []
        ends = [torch.stack(torch.aminmax(mean[self.edges[i] : self.edges[i + 1]])) for i in waiting]
        found: list[tuple[int, int, int]] = []
        self.undecided = []
        for index, largest in zip(waiting, torch.stack(ends).abs().amax(1).tolist(), strict=True):
            if largest == 0.0:
                self.undecided.append(index)
            elif math.isfinite(largest) and not UNSCALED[0] <= largest <= UNSCALED[1]:
                self._of[index] = max(-MAX_EXPONENT, min(MAX_EXPONENT, -math.frexp(largest)[1]))
                found.append((self.edges[index], self.edges[index + 1], self._of[index]))
        return found

    def state(self) -> Tensor:
        """Return one int16 per range: its exponent, or `UNDECIDED`."""
        exponents = torch.zeros(max(0, len(self.edges) - 1), dtype=torch.int16, device="cpu")
        for index, exponent in self._of.items():
            exponents[index] = exponent
        exponents[self.undecided] = UNDECIDED
        return exponents

    def load(self, exponents: Tensor) -> None:
        """Load a `state` with the same ranges."""
        every = enumerate(exponents.tolist())
        of = {index: exponent for index, exponent in every if exponent != 0}
        self.undecided = [index for index, exponent in of.items() if exponent == UNDECIDED]
        self._of = {index: exponent for index, exponent in of.items() if exponent != UNDECIDED}

    def load_nothing(self, mean: Tensor, m2: Tensor) -> None:
        """Load a state of a release without exponents. Ranges that have moved stay unscaled."""
        self._of, edges = {}, self.edges
        self.undecided = [
            i for i in range(max(0, len(edges) - 1))
            if not (mean[edges[i] : edges[i + 1]].any() or m2[edges[i] : edges[i + 1]].any())
        ]  # fmt: skip
