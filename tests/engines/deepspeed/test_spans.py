"""Owned ranges of inner tensors: neighbours are read as one, and each element goes to its place."""

from __future__ import annotations

import pytest
import torch

from mols_ds.core.lr_scaler import Piece
from mols_ds.engines.deepspeed.spans import OwnedPiece, Spans


def test_neighbours_are_one_range_and_padding_parts_them() -> None:
    first, second, alien = torch.arange(10.0), torch.arange(100.0, 106.0), torch.zeros(3)
    owned = [
        OwnedPiece(0, Piece("a", 0, 0, 3)),
        OwnedPiece(0, Piece("b", 5, 3, 2)),  # a neighbour, from the middle of its parameter
        OwnedPiece(0, Piece("c", 0, 6, 2)),  # behind one element of padding
        OwnedPiece(1, Piece("d", 0, 0, 4)),
        OwnedPiece(1, Piece("e", 0, 4, 2)),
    ]
    spans = Spans([first, second, alien], owned)
    found = [(offset, g.tolist()) for tensor in (first, second) for offset, g in spans.cut(tensor, tensor)]
    assert found == [(0, [0, 1, 2, 3, 4]), (5, [6, 7]), (7, [100, 101, 102, 103, 104, 105])]
    assert list(spans.cut(alien, None)) == []
    with pytest.raises(AssertionError, match="no gradient"):
        list(spans.cut(first, None))
