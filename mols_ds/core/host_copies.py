"""Copy device tensors to host memory, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 16 * 2**20
"""Bytes per copy. Two buffers: the next chunk is copied while the previous one is used."""


class HostCopies:
    """Copy through two reused buffers: pinned and asynchronous for CUDA tensors."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def chunks(self, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (offset, copy on the CPU) of a 1-D tensor. A copy is valid until the next one is yielded.

        All copies are complete when the iteration ends: the tensor may change then.
        """
        step = CHUNK_BYTES // tensor.element_size()
        last: tuple[int, Tensor, Callable[[], object]] | None = None
        for number, at in enumerate(range(0, tensor.numel(), step)):
            begun = (at, *self._begin(tensor[at : at + step], number % 2))
            if last is not None:
                last[2]()
                yield last[:2]
            last = begun
        if last is not None:
            last[2]()
            yield last[:2]

    def _begin(self, chunk: Tensor, which: int) -> tuple[Tensor, Callable[[], object]]:
        """Return (copy, function that waits for it)."""
        if not self._buffers:
            self._buffers = [pinned(CHUNK_BYTES, chunk.device) for _ in range(2)]
        copy = self._buffers[which].view(chunk.dtype)[: chunk.numel()]
        return copy, copy_async(chunk, copy)


def pinned(size: int, device: torch.device) -> Tensor:
    """Allocate `size` bytes of host memory: page-locked for CUDA devices, where asynchronous copies need it."""
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")


def copy_async(source: Tensor, target: Tensor) -> Callable[[], object]:
    """Start a copy to the host. Returns a function that waits for it."""
    if source.device.type != "cuda":
        target.copy_(source)
        return lambda: None
    with torch.cuda.device(source.device):
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
    return event.synchronize
