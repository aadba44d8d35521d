"""Compare the ranks when MoLS attaches. Every rank raises on a difference, so none is left waiting.

Nothing here runs in a training step. `together` exchanges compressed text, a few bytes to a few KiB per rank.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from mols_ds import errors
from mols_ds.core.config import MolsConfig
from mols_ds.core.groups import GroupTable
from mols_ds.core.local_stats import LocalStats
from mols_ds.core.phases import Schedule
from mols_ds.core.resume_rules import section_of
from mols_ds.errors import MolsError

T = TypeVar("T")
Reduce = Callable[[Tensor], Tensor]
"""SUM over the ranks: 1-D float64 in, CPU float64 out."""


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


def check_section(config: MolsConfig, schedule: Schedule, reduce: Reduce) -> None:
    """Check that the section, except for `report_dir`, and the schedule are the same on all ranks. One reduction of
    72 bytes.

    Args:
        config, schedule: of this rank.
        reduce: see `Reduce`.

    Raises:
        MolsError: on every rank.
    """
    compared = {key: value for key, value in section_of(config).items() if key != "report_dir"}
    if not alike(zlib.crc32(repr((sorted(compared.items()), schedule.start, schedule.ramp_end)).encode()), reduce):
        raise MolsError(
            'the "mols" section is not the same on every rank, or the number of steps of the scheduler is not (an old '
            "config on one machine, a loader of another length?): use the same on all"
        )


def alike(number: int, reduce: Reduce) -> bool:
    """Whether a number below 2^32 is the same on every rank. One reduction of 72 bytes."""
    mark = torch.tensor(list(number.to_bytes(4, "big")), dtype=torch.float64, device="cpu")
    ranks, *sums = reduce(torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), mark, mark.square()])).tolist()
    # n * sum(b^2) = (sum b)^2 only if all n values are equal; integers below 2^53, so this is exact
    return all(ranks * squares == total * total for total, squares in zip(sums[:4], sums[4:], strict=True))


def check_counts(table: GroupTable, owned: LocalStats, reduce: Reduce) -> None:
    """Check that exactly one rank owns each element of the logical model. One small reduction.

    Args:
        table: of the whole model.
        owned: elements of this rank.
        reduce: see `Reduce`.

    Raises:
        MolsError: on every rank, with the group and both numbers.
    """
    mine = dict.fromkeys(table.elements, 0)
    for item in owned.ranges:
        for group, count in owned.layouts[item.name].counts(item.start, item.numel).items():
            mine[group] += count
    counts = torch.tensor([float(count) for count in mine.values()], dtype=torch.float64, device="cpu")
    counted = reduce(counts).tolist()
    for group, count in zip(mine, counted, strict=True):
        if int(count) != table.elements[group]:
            raise MolsError(
                f'group "{group}" has {table.elements[group]} elements in the whole model, but the ranks together '
                f"own {int(count)}: give all ranks the same model config, and give MoLS all model parts of each rank"
            )
