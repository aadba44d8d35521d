"""Gradients in pieces: flat parts of tensors and of lists of tensors without a copy, and one pass that sees NaN.

A shard may be as large as the memory that is left beside it, so nothing here makes a tensor of a shard's size.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

PIECE_BYTES = 64 * 2**20
"""No copy of a part of a gradient is larger."""
ZEROS = 1 << 20
"""Elements of the zeros that stand in for the gradient of a parameter without one."""

Parts = Generator[tuple[int, Tensor], None, None]
"""(offset, 1-D gradient); closed by its reader, so that buffers are given back where the reader raises."""


def gradient_of(tensor: Tensor) -> Tensor | None:
    """The gradient that an optimizer's step reads of this tensor.

    Under Megatron-core's precision-aware optimizer, Transformer Engine's FusedAdam reads it from `decoupled_grad`
    (core/optimizer/distrib_optimizer.py): its type may be another than the tensor's.
    """
    gradient: Tensor | None = getattr(tensor, "decoupled_grad", None)
    return tensor.grad if gradient is None else gradient


def flat_pieces(tensor: Tensor, start: int, numel: int) -> Iterator[Tensor]:
    """Elements [start, start + numel) of a tensor in row-major order, as 1-D pieces.

    Args:
        tensor: any shape, dtype, stride and device.

    Yields:
        One view of a contiguous tensor; else copies of at most `PIECE_BYTES`.
    """
    if numel == 0:
        return
    if tensor.is_contiguous():
        yield tensor.view(-1).narrow(0, start, numel)
        return
    row = tensor.numel() // len(tensor)
    rows, end = PIECE_BYTES // (row * tensor.element_size()), start + numel
    for first in range(start // row, -(-end // row), max(1, rows)):
        begin = first * row
        size = min(max(1, rows), len(tensor) - first) * row
        low, high = max(start, begin), min(end, begin + size)
        if rows == 0:
            yield from flat_pieces(tensor[first], low - begin, high - low)
        else:
            yield tensor[first : first + rows].reshape(-1)[low - begin : high - begin]


class FlatList:
    """Tensors as one flat tensor, without the copy that `torch.cat` makes."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.starts = [0, *accumulate(tensor.numel() for tensor in tensors)]

    def pieces(self, start: int, numel: int) -> Iterator[tuple[int, Tensor]]:
        """(offset from `start`, 1-D piece) of elements [start, start + numel), in order."""
        at, end = start, start + numel
        index = bisect_right(self.starts, start) - 1
        while at < end:
            inside = min(end, self.starts[index + 1]) - at
            for piece in flat_pieces(self.tensors[index], at - self.starts[index], inside):
                yield at - start, piece
                at += piece.numel()
            index += 1


def zero_pieces(numel: int, device: torch.device | str = "cpu") -> Iterator[tuple[int, Tensor]]:
    """(offset, 1-D fp32 zeros) of a gradient that is zero: one small tensor, again and again."""
    zeros = torch.zeros(min(numel, ZEROS), device=device)
    for at in range(0, numel, ZEROS):
        yield at, zeros[: numel - at]


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every element is finite. Reads each element once, keeps nothing of an element's size.

    The least and the largest element are NaN where one element is (`torch.aminmax`), and x - x is 0 for finite x
    only. One number a device is added up; it is read at the end, so that devices are waited for once.
    """
    found: dict[torch.device, Tensor] = {}
    for tensor in tensors:
        for piece in flat_pieces(tensor.detach(), 0, tensor.numel()):
            low, high = torch.aminmax(piece)
            here = (low - low) + (high - high)
            found[piece.device] = found[piece.device] + here if piece.device in found else here
    return all(float(total) == 0.0 for total in found.values())
