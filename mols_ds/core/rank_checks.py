"""Compare the ranks when MoLS attaches. Every rank raises on a difference, so none is left waiting."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mols_ds.core.config import MolsConfig
from mols_ds.core.groups import GroupTable
from mols_ds.core.ranges import ShardRange
from mols_ds.core.resume_rules import section_of
from mols_ds.errors import MolsError

Reduce = Callable[[Tensor], Tensor]
"""SUM over the ranks: 1-D float64 in, CPU float64 out."""


def check_section(config: MolsConfig, reduce: Reduce) -> None:
    """Check that the section is the same on all ranks, except for `report_dir`. One reduction of 72 bytes.

    Args:
        config: of this rank.
        reduce: see `Reduce`.

    Raises:
        MolsError: on every rank.
    """
    compared = {key: value for key, value in section_of(config).items() if key != "report_dir"}
    number = zlib.crc32(repr(sorted(compared.items())).encode())
    mark = torch.tensor(list(number.to_bytes(4, "big")), dtype=torch.float64, device="cpu")
    ranks, *sums = reduce(torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), mark, mark.square()])).tolist()
    # n * sum(b^2) = (sum b)^2 only if all n values are equal; integers below 2^53, so this is exact
    if any(ranks * squares != total * total for total, squares in zip(sums[:4], sums[4:], strict=True)):
        raise MolsError(
            'the "mols" section is not the same on every rank (an old config on one machine?): use one config on all'
        )


def check_counts(table: GroupTable, owned: Iterable[ShardRange], reduce: Reduce) -> None:
    """Check that exactly one rank owns each element of the logical model. One small reduction.

    Args:
        table: of the whole model.
        owned: ranges of this rank.
        reduce: see `Reduce`.

    Raises:
        MolsError: on every rank, with the group and both numbers.
    """
    mine = dict.fromkeys(table.elements, 0)
    for item in owned:
        for group, count in table.layouts[item.name].counts(item.start, item.numel).items():
            mine[group] += count
    counts = torch.tensor([float(count) for count in mine.values()], dtype=torch.float64, device="cpu")
    counted = reduce(counts).tolist()
    for group, count in zip(mine, counted, strict=True):
        if int(count) != table.elements[group]:
            raise MolsError(
                f'group "{group}" has {table.elements[group]} elements in the whole model, but the ranks together '
                f"own {int(count)}: give all ranks the same model config, and give MoLS all model parts of each rank"
            )
