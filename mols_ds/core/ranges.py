"""Ranges of parameters, and their positions in a rank's tensors.

All indices are flat (row-major). A *logical* parameter is the unsharded parameter. A rank's optimizer steps tensors
with ranges of logical parameters (ZeRO's flat shards, Megatron's fp32 copies). The rank's accumulators hold the
statistics of some of these ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

Key = TypeVar("Key")
"""Identifies the tensor of a range: its number, or the engine's record of it."""


class ParamRange(NamedTuple):
    """Elements [start, start + numel) of the flat logical parameter `name`."""

    name: str
    start: int
    numel: int

    def part(self, low: int, high: int) -> ParamRange:
        """Return elements [low, high) relative to this range's first element, clipped to the range (numel >= 0)."""
        first, numel = _clip(low, high, self.numel)
        return ParamRange(self.name, self.start + first, numel)

    def at(self, offset: int) -> ShardRange:
        """Return the same elements at [offset, offset + numel) of a flat tensor."""
        return ShardRange(self.name, self.start, offset, self.numel)


class ShardRange(NamedTuple):
    """Elements [start, start + numel) of the flat logical parameter `name`, at [offset, offset + numel) of a tensor.

    The tensor is one of the optimizer's, or this rank's accumulators. Checkpoints hold ranges as tuples in this order
    of fields. Changing the order would restart unfinished calibrations from older releases.
    """

    name: str
    start: int
    offset: int
    numel: int

    def part(self, low: int, high: int) -> ShardRange:
        """Return elements [low, high) relative to this range's first element, clipped to the range (numel >= 0)."""
        first, numel = _clip(low, high, self.numel)
        return ShardRange(self.name, self.start + first, self.offset + first, numel)

    def view(self, flat: Tensor) -> Tensor:
        """Return a 1-D view of these elements in their 1-D tensor."""
        return flat.narrow(0, self.offset, self.numel)


def _clip(low: int, high: int, numel: int) -> tuple[int, int]:
    """Return (first index, count) of the intersection of [low, high) and [0, numel)."""
    first = min(max(low, 0), numel)
    return first, max(min(high, numel) - first, 0)


def split_among_replicas(
    ranges: Sequence[tuple[Key, ShardRange]], rank: int, replicas: int
) -> list[tuple[Key, ShardRange]]:
    """Split replicated ranges among the replicas, so that each element is counted once.

    Concatenates the ranges and cuts them into `replicas` contiguous parts. Their sizes differ by at most 1.

    Args:
        ranges: the same list on every replica, without ranges that other ranks count.
        rank: this rank's index among the replicas.
        replicas: number of ranks that hold `ranges`.

    Returns:
        This rank's non-empty parts, in the order of `ranges`. Empty list: fewer elements than replicas.
    """
    total = sum(item.numel for _, item in ranges)
    low, high = total * rank // replicas, total * (rank + 1) // replicas
    parts, at = [], 0
    for key, item in ranges:
        part = item.part(low - at, high - at)
        if part.numel:
            parts.append((key, part))
        at += item.numel
    return parts


def pack(ranges: Iterable[ShardRange]) -> list[ShardRange]:
    """Set the offsets so that the ranges are contiguous, as in this rank's accumulators."""
    packed, offset = [], 0
    for item in ranges:
        packed.append(item._replace(offset=offset))
        offset += item.numel
    return packed


class Span(NamedTuple):
    """Copy elements [source, source + numel) of one flat tensor to [target, target + numel) of another."""

    source: int
    target: int
    numel: int


def merge_neighbours(spans: Iterable[Span]) -> list[Span]:
    """Join consecutive spans that are adjacent in both tensors."""
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last is not None and (last.source + last.numel, last.target + last.numel) == (span.source, span.target):
            merged[-1] = last._replace(numel=last.numel + span.numel)
        else:
            merged.append(span)
    return merged


def spans_to_accumulators(owned: Sequence[tuple[Key, ShardRange]]) -> dict[Key, list[Span]]:
    """Map the elements of each tensor to this rank's accumulators (`pack`).

    A flat shard without padding is one span, so the cost of reading a gradient does not grow with the number of
    parameters.

    Args:
        owned: (tensor, range in it), in the order of the accumulators.
    """
    spans: dict[Key, list[Span]] = {}
    for (key, item), packed in zip(owned, pack(item for _, item in owned), strict=True):
        spans.setdefault(key, []).append(Span(item.offset, packed.offset, item.numel))
    return {key: merge_neighbours(found) for key, found in spans.items()}
