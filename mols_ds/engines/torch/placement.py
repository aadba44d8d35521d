"""Which elements of a logical parameter this rank has.

A plain tensor is the whole parameter, copied on every rank (DDP). A DTensor is this rank's block of it: for each
dimension the indices that its placements leave on this rank. Statistics and rates only need to know the module group of
each local element, so a block that is no range of the logical parameter (rows cut in two by `Shard(1)`) has a layout of
its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor

from mols_ds.core.layout import ElementLayout
from mols_ds.core.pieces import local_part
from mols_ds.core.ranges import ParamRange
from mols_ds.errors import MolsUnsupportedError

Indices = Sequence[int]
"""Indices of one dimension of a logical parameter that a rank has, ascending within one mesh dimension's cut."""


class Block(NamedTuple):
    """The local elements of a parameter.

    range: of the logical parameter, or from 0 on in the block's own layout. layout: of this range's flat index.
    columns: elements of a row of a matrix on this rank; 0: the rows are no range.
    """

    range: ParamRange
    layout: ElementLayout
    columns: int = 0


def block_of(name: str, parameter: nn.Parameter, layout: ElementLayout) -> Block:
    """Return this rank's block of a parameter.

    Args:
        name: of the logical parameter.
        parameter: a plain tensor or a DTensor.
        layout: of the logical parameter.

    Raises:
        MolsUnsupportedError: a placement that cannot be expressed; names the parameter.
    """
    if not isinstance(parameter, DTensor):
        return Block(ParamRange(name, 0, parameter.numel()), layout, math.prod(parameter.shape[1:]))
    held = _held(name, parameter)
    block = _block(name, tuple(parameter.shape), held, layout)
    if block is None:
        raise MolsUnsupportedError(
            f"MoLS does not support parameter {name!r} with elements of {', '.join(layout.groups)} and the placements "
            f"{describe(parameter)}: shard it along the dimension that is fused, or give it one group with a rule"
        )
    return block


def describe(parameter: Tensor) -> str:
    """Return the placements of a DTensor as text; "" for a plain tensor."""
    return ", ".join(map(repr, parameter.placements)) if isinstance(parameter, DTensor) else ""


def _held(name: str, parameter: DTensor) -> list[Indices]:
    """Return the indices of each dimension that this rank has. No communication."""
    for placement in parameter.placements:
        if not (placement.is_replicate() or hasattr(placement, "dim")):
            raise MolsUnsupportedError(
                f"MoLS does not support parameter {name!r} with the placement {placement!r}: use Shard or Replicate"
            )
    if parameter.device_mesh.get_coordinate() is None:
        raise MolsUnsupportedError(
            f"MoLS does not support parameter {name!r}, whose device mesh has not all ranks of this job: use one mesh "
            "over all of them"
        )
    held = [_indices(parameter, dim, size) for dim, size in enumerate(parameter.shape)]
    local = tuple(local_part(parameter).shape)
    if tuple(map(len, held)) != local:
        raise MolsUnsupportedError(
            f"MoLS does not support the shards of parameter {name!r}: {list(local)} elements are here, and its "
            f"placements {describe(parameter)} give {list(map(len, held))}"
        )
    return held


def _indices(parameter: DTensor, dim: int, size: int) -> Indices:
    cut: list[Placement] = [
        placement if getattr(placement, "dim", None) in (dim, dim - parameter.dim()) else Replicate()
        for placement in parameter.placements
    ]
    if all(placement.is_replicate() for placement in cut):
        return range(size)
    for i, placement in enumerate(cut):
        if not placement.is_replicate():
            cut[i] = _along_first(placement)
    mesh = parameter.device_mesh
    every = torch.arange(size, device=mesh.device_type)
    return list(map(int, local_part(distribute_tensor(every, mesh, cut, src_data_rank=None)).tolist()))


def _along_first(placement: Placement) -> Placement:
    """Return the same cut of a 1-D tensor."""
    kind, factor = type(placement), getattr(placement, "split_factor", None)
    return kind(0) if factor is None else kind(0, split_factor=factor)  # type: ignore[call-arg]


def _block(name: str, shape: tuple[int, ...], held: Sequence[Indices], layout: ElementLayout) -> Block | None:
    """Return the block with these indices; None if no layout describes its groups."""
    numel = math.prod(map(len, held))
    whole = [len(indices) == size for indices, size in zip(held, shape, strict=True)]
    if not shape or numel == 0 or (all(whole[1:]) and _contiguous(held[0])):
        start = held[0][0] * math.prod(shape[1:]) if shape and numel else 0
        return Block(ParamRange(name, start, numel), layout, math.prod(shape[1:]))
    if len(layout.groups) == 1:
        columns = math.prod(map(len, held[1:])) if _contiguous(held[0]) else 0
        return Block(ParamRange(name, held[0][0] * columns, numel), layout, columns)
    dim = _fused_dimension(shape, layout)
    if dim is None:
        return None
    row, local_row = math.prod(shape[dim + 1 :]), math.prod(map(len, held[dim + 1 :]))
    steps = layout.inner // row
    if dim == 0 and _contiguous(held[0]):
        return Block(ParamRange(name, held[0][0] * local_row, numel), ElementLayout(steps * local_row, layout.pattern))
    groups = [group for group, _, length in layout.runs(0, shape[dim] * row) for _ in range(length // row)]
    pattern = tuple((len([*same]), group) for group, same in groupby(groups[index] for index in held[dim]))
    return Block(ParamRange(name, 0, numel), ElementLayout(local_row, pattern))


def _fused_dimension(shape: tuple[int, ...], layout: ElementLayout) -> int | None:
    """Return the dimension whose index alone decides the group of an element; None: there is none."""
    for dim, size in enumerate(shape):
        row = math.prod(shape[dim + 1 :])
        if layout.inner % row == 0 and (dim == 0 or (size * row) % layout.period == 0):
            return dim
    return None


def _contiguous(indices: Indices) -> bool:
    return not indices or indices[-1] - indices[0] + 1 == len(indices)
