"""The parameter ranges of a rank, and sums of their blocks over the ranks that share them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mols_ds.core.ranges import ShardRange
from mols_ds.errors import MolsUnsupportedError
from mols_ds.optim.param_blocks import Blocks, BlockView, step_squares

Reduce = Callable[[Tensor], Tensor]
"""SUM of a 1-D float64 tensor over the ranks with disjoint ranges; the result is on the argument's device."""


@dataclass(frozen=True)
class ParamShard:
    """A range of a parameter in an inner tensor of this rank, and its blocks.

    shape: of the whole parameter. number: index of the parameter in the model, the same on every rank.
    row: index of the range in its tensor. at, slot: index of its first block among the blocks of its tensor, and of
    this rank. device: of the tensor.
    """

    range: ShardRange
    shape: tuple[int, ...]
    blocks: Blocks
    number: int
    row: int
    at: int
    slot: int
    device: torch.device

    @cached_property
    def touched(self) -> tuple[int, int]:
        """(first block, number of blocks) with elements in this range."""
        return self.blocks.touched(self.range.start, self.range.numel)

    @cached_property
    def views(self) -> list[BlockView]:
        return list(self.blocks.views(self.range.start, self.range.numel))

    @cached_property
    def block_of_step(self) -> list[Tensor]:
        """For each view, the block of each step, relative to the first touched one, int64."""
        first = self.touched[0]
        return [(self.blocks.of_step[v.first : v.first + v.steps] - first).to(self.device) for v in self.views]

    @cached_property
    def sizes(self) -> Tensor:
        """Elements of each touched block in the whole parameter, float64."""
        first, count = self.touched
        return self.blocks.sizes(math.prod(self.shape))[first : first + count].to(self.device)

    def of(self, flat: Tensor) -> Tensor:
        """View the elements of this range in the 1-D inner tensor, or in a tensor of its length; no copy."""
        return self.range.view(flat)

    @cached_property
    def runs(self) -> list[tuple[int, Tensor]]:
        """For each view, its first block (as above) and the number of steps of each block, int64."""
        counts = [torch.unique_consecutive(of_step, return_counts=True) for of_step in self.block_of_step]
        return [(int(blocks[0]), steps) for blocks, steps in counts]

    def add_squares(self, values: Tensor, out: Tensor) -> None:
        """out[b] += sum of squares of block b. values: 1-D, this range; out: float64 (touched blocks,).

        The order of addition is fixed, so that data-parallel replicas of stage 0 get the same bits.
        """
        for view, (first, steps) in zip(self.views, self.runs, strict=True):
            sums = step_squares(view.of(values))
            if steps.numel() < sums.numel():
                sums = torch.segment_reduce(sums, "sum", lengths=steps)
            out[first : first + steps.numel()] += sums

    def parts(self, values: Tensor, *flats: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield (block values in a shape that broadcasts, views of each flat), which cover this range once.

        values: (touched blocks,); flats: 1-D, the inner tensor or tensors of its length.
        """
        for view, of_step in zip(self.views, self.block_of_step, strict=True):
            yield values[of_step][:, None], [view.of(self.of(flat)) for flat in flats]


class SharedSums:
    """Add up the statistics of blocks that several ranks share.

    Args:
        shards: all of this rank.
        blocks, shapes: of every parameter of the model, in the same order on every rank.
        reduce: see `Reduce`. Called once here, and once per call if any block is shared.

    Raises:
        MolsUnsupportedError: on every rank, if the ranks' shards do not cover each element exactly once.
    """

    def __init__(
        self,
        shards: Sequence[ParamShard],
        blocks: Mapping[str, Blocks],
        shapes: Mapping[str, tuple[int, ...]],
        reduce: Reduce,
        device: torch.device,
    ) -> None:
        self.reduce = reduce
        offsets, total = {}, 0
        for name, parameter in blocks.items():
            offsets[name], total = total, total + parameter.count
        counted = torch.zeros(2, total, dtype=torch.float64, device="cpu")
        local = torch.full((total,), -1, device="cpu")
        for shard in shards:
            item = shard.range
            where = slice(offsets[item.name], offsets[item.name] + shard.blocks.count)
            mine = shard.blocks.counted(item.start, item.numel)
            counted[0, where] += mine
            counted[1, where] += mine > 0
            first, count = shard.touched
            local[where][first : first + count] = torch.arange(shard.slot, shard.slot + count, device="cpu")
        counted = reduce(counted.view(-1).to(device)).view(2, total).cpu()
        self._check(counted[0], blocks, shapes)
        mine = local[counted[1] > 1]
        self.length = mine.numel()
        """Number of shared blocks: the length of the reduction per kind of sum."""
        self.slots = torch.nonzero(mine >= 0).view(-1).to(device)
        self.local = mine[mine >= 0].to(device)

    @staticmethod
    def _check(counted: Tensor, blocks: Mapping[str, Blocks], shapes: Mapping[str, tuple[int, ...]]) -> None:
        at = 0
        for name, parameter in blocks.items():
            expected = parameter.sizes(math.prod(shapes[name]))
            if not torch.equal(counted[at : at + parameter.count], expected):
                raise MolsUnsupportedError(
                    f"the ranks' shards have {int(counted[at : at + parameter.count].sum())} elements of {name!r}, "
                    f"which has {math.prod(shapes[name])}, or have some twice: optimizers that sum over the shards "
                    "need ZeRO over all data-parallel ranks (no hpZ, MiCS or expert groups)"
                )
            at += parameter.count

    def __call__(self, values: Tensor) -> None:
        """Replace this rank's sums of shared blocks by those of all ranks; float64 (kinds, this rank's blocks)."""
        if not self.length:
            return
        buffer = values.new_zeros(values.shape[0], self.length)
        buffer[:, self.slots] = values[:, self.local]
        buffer = self.reduce(buffer.view(-1)).view_as(buffer)
        values[:, self.local] = buffer[:, self.slots]
