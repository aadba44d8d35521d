"""Ranges of parameters: which elements of a parameter they are, and where a rank keeps them.

All indices are flat (row-major). A *logical* parameter is what one rank would hold without parallelism. A rank holds
ranges of logical parameters in the tensors that its optimizer steps (ZeRO's flat shards, Megatron's fp32 copies), and
it keeps statistics of some of them in its accumulators.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

Key = TypeVar("Key")
"""Says which tensor a range is in: its number, or the tensor's own record."""


class ParamRange(NamedTuple):
    """Elements [start, start + numel) of the flat logical parameter `name`."""

    name: str
    start: int
    numel: int

    def part(self, low: int, high: int) -> ParamRange:
        """Elements low to high of this range, counted from its first; those outside of it are left out (numel >= 0)."""
        first, numel = _clip(low, high, self.numel)
        return ParamRange(self.name, self.start + first, numel)

    def at(self, offset: int) -> ShardRange:
        """The same elements, which are at [offset, offset + numel) of a flat tensor."""
        return ShardRange(self.name, self.start, offset, self.numel)


class ShardRange(NamedTuple):
    """Elements [start, start + numel) of the flat logical parameter `name`, at [offset, offset + numel) of a tensor.

    The tensor is one that the optimizer steps, or this rank's accumulators. Checkpoints hold ranges as plain tuples in
    the order of these fields: a change of it makes half-done calibrations of former releases start over.
    """

    name: str
    start: int
    offset: int
    numel: int

    def part(self, low: int, high: int) -> ShardRange:
        """Elements low to high of this range, counted from its first; those outside of it are left out (numel >= 0)."""
        first, numel = _clip(low, high, self.numel)
        return ShardRange(self.name, self.start + first, self.offset + first, numel)

    def view(self, flat: Tensor) -> Tensor:
        """These elements of the 1-D tensor that they are in; 1-D, no copy."""
        return flat.narrow(0, self.offset, self.numel)


def _clip(low: int, high: int, numel: int) -> tuple[int, int]:
    """(first, number) of the indices that [low, high) and [0, numel) share."""
    first = min(max(low, 0), numel)
    return first, max(min(high, numel) - first, 0)


def split_among_replicas(
    ranges: Sequence[tuple[Key, ShardRange]], rank: int, replicas: int
) -> list[tuple[Key, ShardRange]]:
    """This rank's share of ranges that several ranks hold alike, so that together they have each element once.

    The ranges are taken as one sequence of elements, which is cut into `replicas` consecutive shares whose sizes differ
    by at most 1.

    Args:
        ranges: the same list on every replica. Those that no rank of these is to count are not in it.
        rank: this rank's number among the replicas, from 0.
        replicas: number of ranks that hold `ranges`.

    Returns:
        The parts of this rank, in the order of `ranges`, none of them empty. None where there are fewer elements.
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
    """The same elements, each range where the one before it ends: their places in this rank's accumulators."""
    packed, offset = [], 0
    for item in ranges:
        packed.append(item._replace(offset=offset))
        offset += item.numel
    return packed


class Span(NamedTuple):
    """Elements [source, source + numel) of one flat tensor, which go to [target, target + numel) of another."""

    source: int
    target: int
    numel: int


def merge_neighbours(spans: Iterable[Span]) -> list[Span]:
    """The same elements in as few spans as their order allows: those that follow each other in both tensors are one."""
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last is not None and (last.source + last.numel, last.target + last.numel) == (span.source, span.target):
            merged[-1] = last._replace(numel=last.numel + span.numel)
        else:
            merged.append(span)
    return merged


def spans_to_accumulators(owned: Sequence[tuple[Key, ShardRange]]) -> dict[Key, list[Span]]:
    """Which elements of each tensor go where in this rank's accumulators (`pack`).

    A flat shard of thousands of parameters without padding between them is one span: what it costs to read a gradient
    does not depend on the number of parameters.

    Args:
        owned: (tensor, range in it), in the order of the accumulators.
    """
    spans: dict[Key, list[Span]] = {}
    for (key, item), packed in zip(owned, pack(item for _, item in owned), strict=True):
        spans.setdefault(key, []).append(Span(item.offset, packed.offset, item.numel))
    return {key: merge_neighbours(found) for key, found in spans.items()}
