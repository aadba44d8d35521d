"""Collective setup: an error on one rank is raised on all ranks, so that no rank hangs.

Used when MoLS attaches, never in a training step. Ranks exchange compressed text, a few bytes to a few KiB per rank.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import distributed as dist

from megatron_patches.param_map import LocalParameter
from mols_ds import errors
from mols_ds.errors import MolsError

Shapes = dict[str, tuple[int, ...]]
T = TypeVar("T")


def together(build: Callable[[], T]) -> list[T]:
    """Call `build` on every rank and return all results (converted by JSON), in rank order. Collective.

    Raises:
        MolsError: `build` raised on some rank. That rank raises its own error. The others raise the same class
            (`MolsError` for an error from outside this package) with the first such rank.
    """
    if not dist.is_initialized():
        return [build()]
    mine, error = None, None
    try:
        mine = build()
    except Exception as caught:  # any type: all ranks need the error
        error = caught
    told = None if error is None else [type(error).__name__, _text(error)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, zlib.compress(json.dumps([mine, told]).encode()))
    if error is not None:
        raise error
    values, problems = [], []
    for rank, data in enumerate(everyone):
        value, problem = json.loads(zlib.decompress(data))
        values.append(value)
        if problem is not None:
            problems.append((rank, *problem))
    if problems:
        rank, kind, text = problems[0]
        raise _class_of(kind)(f"rank {rank}: {text}")
    return values


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, MolsError) else f"{type(error).__name__}: {error}"


def _class_of(kind: str) -> type[MolsError]:
    found = getattr(errors, kind, MolsError)
    return found if isinstance(found, type) and issubclass(found, MolsError) else MolsError


def same_everywhere(values: Sequence[Sequence[object]], what: Sequence[str]) -> None:
    """Raise `MolsError` on every rank unless item i of each rank, named `what[i]`, equals rank 0's."""
    for rank, value in enumerate(values):
        for name, first, here in zip(what, values[0], value, strict=True):
            if first != here:
                raise MolsError(f"{name}: {here} on rank {rank}, but {first} on rank 0; all ranks need the same")


def merge_shapes(told: Sequence[Mapping[str, Sequence[int]]]) -> Shapes:
    """Merge the names and shapes of all ranks into the logical model. Raises `MolsError` where two ranks differ."""
    shapes: Shapes = {}
    teller: dict[str, int] = {}
    for rank, theirs in enumerate(told):
        for name, sizes in theirs.items():
            shape = tuple(sizes)
            if shapes.setdefault(name, shape) != shape:
                raise MolsError(
                    f"parameter {name!r} has the unsharded shape {list(shape)} on rank {rank} and "
                    f"{list(shapes[name])} on rank {teller[name]}: the ranks were built from different model configs"
                )
            teller.setdefault(name, rank)
    return shapes


def check_locals(locals_: Sequence[LocalParameter], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `MolsError` where a parameter's shape differs from the shape on the rank that counts it."""
    for local in locals_:
        if shapes.get(local.name) == local.shape:
            continue
        there = f"of unsharded shape {list(shapes[local.name])}" if local.name in shapes else "without it"
        raise MolsError(
            f"parameter {local.name!r} has the unsharded shape {list(local.shape)} here, but the rank that counts it "
            f"has a model {there}: the ranks were built from different model configs"
        )
