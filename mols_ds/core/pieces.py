"""Read gradients in 1-D pieces without copying a shard, and check for NaN in one pass.

A shard may be as large as the free memory, so no function here allocates a tensor of its size.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

PIECE_BYTES = 64 * 2**20
"""Largest copy of a part of a gradient."""
ZEROS = 1 << 20
"""Elements of the zero tensor for parameters without a gradient."""

Parts = Generator[tuple[int, Tensor], None, None]
"""(offset, 1-D gradient) pairs. Readers close the generator, so that buffers are freed when they raise."""


def gradient_of(tensor: Tensor) -> Tensor | None:
    """Return the gradient that an optimizer's step reads of this tensor.

    With Megatron-core's precision-aware optimizer, Transformer Engine's FusedAdam reads `decoupled_grad`
    (core/optimizer/distrib_optimizer.py). Its dtype may differ from the tensor's.
    """
    gradient: Tensor | None = getattr(tensor, "decoupled_grad", None)
    return tensor.grad if gradient is None else gradient


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor (its elements, as a view); any other tensor unchanged."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def flat_pieces(tensor: Tensor, start: int, numel: int) -> Iterator[Tensor]:
    """Yield elements [start, start + numel) of a tensor in row-major order, as 1-D pieces.

    Args:
        tensor: any shape, dtype, stride and device.

    Yields:
        One view of a contiguous tensor, else copies of at most `PIECE_BYTES`.
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
    """A list of tensors as one flat tensor, without the copy of `torch.cat`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.starts = [0, *accumulate(tensor.numel() for tensor in tensors)]

    def pieces(self, start: int, numel: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (offset from `start`, 1-D piece) of elements [start, start + numel), in order."""
        at, end = start, start + numel
        index = bisect_right(self.starts, start) - 1
        while at < end:
            inside = min(end, self.starts[index + 1]) - at
            for piece in flat_pieces(self.tensors[index], at - self.starts[index], inside):
                yield at - start, piece
                at += piece.numel()
            index += 1


def zero_pieces(numel: int, device: torch.device | str = "cpu") -> Iterator[tuple[int, Tensor]]:
    """Yield a zero gradient from one small tensor.

    Args:
        numel: elements in all.
        device: of the pieces.

    Yields:
        (offset, 1-D fp32 zeros).
    """
    zeros = torch.zeros(min(numel, ZEROS), device=device)
    for at in range(0, numel, ZEROS):
        yield at, zeros[: numel - at]


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Check whether every element is finite. Reads each element once; allocates nothing of that size.

    `torch.aminmax` returns NaN if any element is NaN, and x - x is 0 only for finite x. Adds one number per device and
    reads it at the end: one synchronization per device.

    Args:
        tensors: any shapes, float dtypes and devices.

    Returns:
        True also for no element.
    """
    found: dict[torch.device, Tensor] = {}
    for tensor in tensors:
        for piece in flat_pieces(tensor.detach(), 0, tensor.numel()):
            low, high = torch.aminmax(piece)
            here = (low - low) + (high - high)
            found[piece.device] = found[piece.device] + here if piece.device in found else here
    return all(float(total) == 0.0 for total in found.values())
