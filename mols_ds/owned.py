"""The elements that one rank measures: which they are, and the group of each sampled one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mols_ds.groups import ElementLayout
from mols_ds.moments import STRIDE


class Owned(NamedTuple):
    """Elements [start, start + numel) of parameter `name` that this rank measures, at `offset` of its accumulators."""

    name: str
    start: int
    offset: int
    numel: int


def group_index(owned: Sequence[Owned], layouts: Mapping[str, ElementLayout], groups: Sequence[str]) -> Tensor:
    """Group number of every STRIDE-th owned element, for the between-sample blocks; 1-D uint8 (int16 past 255)."""
    number = {group: i for i, group in enumerate(groups)}
    dtype = torch.uint8 if len(groups) <= 255 else torch.int16
    size = sum(piece.numel for piece in owned)
    index = torch.zeros((size + STRIDE - 1) // STRIDE, dtype=dtype)
    for piece in owned:
        first = -piece.offset % STRIDE
        if first >= piece.numel:
            continue
        layout = layouts[piece.name]
        elements = torch.arange(piece.start + first, piece.start + piece.numel, STRIDE)
        edges = torch.tensor([length for length, _ in layout.pattern]).cumsum(0)
        slot = (elements // layout.inner) % int(edges[-1])
        names = torch.tensor([number[group] for _, group in layout.pattern], dtype=dtype)
        where = (piece.offset + first) // STRIDE
        index[where : where + elements.numel()] = names[torch.bucketize(slot, edges, right=True)]
    return index
