"""Which contiguous ranges of an engine's inner tensors a rank measures, however many parameters they are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from mols_ds.core.lr_scaler import Piece


class OwnedPiece(NamedTuple):
    """A piece of inner tensor number `tensor` that this rank measures."""

    tensor: int
    piece: Piece


class _Span(NamedTuple):
    """Elements [start, start + numel) of an inner tensor, at `offset` of this rank's accumulators."""

    offset: int
    start: int
    numel: int


class Spans:
    """The owned ranges by inner tensor; pieces that are neighbours in it are one range.

    A flat shard of thousands of parameters without padding between them is read as one: the cost of a gradient sample
    does not depend on how many parameters it has.
    """

    def __init__(self, tensors: Sequence[Tensor], owned: Iterable[OwnedPiece]) -> None:
        """owned: in the order of the accumulators, without gaps there."""
        self._of: dict[int, list[_Span]] = {}
        offset = 0
        for tensor, piece in owned:
            held = self._of.setdefault(id(tensors[tensor]), [])
            last = held[-1] if held else None
            if last is not None and (last.offset + last.numel, last.start + last.numel) == (offset, piece.offset):
                held[-1] = last._replace(numel=last.numel + piece.numel)
            else:
                held.append(_Span(offset, piece.offset, piece.numel))
            offset += piece.numel

    def cut(self, tensor: Tensor, gradient: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """(offset among the owned elements, 1-D gradient) of the owned ranges of one inner tensor.

        gradient: that of all its elements; may be None where this rank owns none of them.
        """
        for offset, start, numel in self._of.get(id(tensor), []):
            assert gradient is not None, "an owned inner tensor has no gradient"
            yield offset, gradient.view(-1).narrow(0, start, numel)
