"""Shards of Megatron's optimizers. The only file that uses private names of megatron.core.optimizer.

Megatron chains one optimizer for dense and one for expert parameters. Each has an inner torch optimizer that steps flat
fp32 ranges of the parameters (`DistributedOptimizer`), full fp32 copies (`Float16OptimizerWithFloat16Params`) or the
parameters (`FP32Optimizer`). After `prepare_grads()` each gradient is reduced over the data-parallel ranks, unscaled
and not yet clipped.

Each logical element is owned by exactly one rank of the world, which measures it. param_map.py selects the rank among
copies on tensor- and pipeline-parallel ranks. Data-parallel replicas (plain DDP, several distributed-optimizer
instances) split the elements. So one SUM over all ranks gives the global sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_patches.compat import WRAPPERS
from megatron_patches.param_map import LocalParameter, ProcessGrid
from mols_ds.core.pieces import Parts, all_finite, gradient_of, zero_pieces
from mols_ds.core.ranges import ShardRange, pack, split_among_replicas
from mols_ds.errors import MolsUnsupportedError

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer


@dataclass(frozen=True, slots=True)
class Shard:
    """One tensor that an inner optimizer steps.

    range: its elements of a logical parameter, at offset 0.
    group: index of its parameter group in the inner optimizer.
    """

    local: LocalParameter
    tensor: Tensor
    range: ShardRange
    group: int

    def gradient(self) -> Tensor | None:
        """Return the reduced gradient after `prepare_grads()`, 1-D. Precision-aware optimizers store it separately."""
        gradient = gradient_of(self.tensor)
        return None if gradient is None else gradient.detach().reshape(-1)


class ChainedPart:
    """A chained optimizer with this rank's shards.

    idle: tensors of the inner optimizer for parameters that are now frozen.
    """

    def __init__(self, outer: MegatronOptimizer, shards: list[Shard]) -> None:
        self.outer = outer
        self.inner = None if getattr(outer, "is_stub_optimizer", False) else outer.optimizer
        self.shards = shards
        planned = {id(shard.tensor) for shard in shards}
        groups = [] if self.inner is None else self.inner.param_groups
        self.idle = [t for group in groups for t in group["params"] if id(t) not in planned]


class MegatronShards:
    """The shards of this rank in all chained optimizers.

    Attributes:
        parts: the chained optimizers, in order.
        owned: (shard, range in its tensor) of the elements that this rank measures, in the order of the accumulators.
        accumulated: the ranges of `owned`, with offsets in the accumulators.

    Raises:
        MolsUnsupportedError: an unknown kind of optimizer, or a parameter of the optimizer that no model chunk has.
    """

    def __init__(self, optimizer: MegatronOptimizer, locals_: Sequence[LocalParameter], grid: ProcessGrid) -> None:
        by_parameter = {id(local.parameter): local for local in locals_}
        chained = getattr(optimizer, "chained_optimizers", None)
        if chained is None:
            raise MolsUnsupportedError(
                f"MoLS does not support {type(optimizer).__name__}: pass what get_megatron_optimizer returns "
                "(a ChainedOptimizer; Megatron-FSDP gives none and is not supported)"
            )
        self.parts = [ChainedPart(outer, list(_shards(outer, by_parameter))) for outer in chained]
        self.owned: list[tuple[Shard, ShardRange]] = []
        for part in self.parts:
            counted = [(shard, shard.range) for shard in part.shards if shard.local.counted]
            self.owned += split_among_replicas(counted, *_replicas(part.outer, part.shards, grid))
        self.accumulated = pack(item for _, item in self.owned)

    def read(self) -> Parts:
        """Return (offset in the owned elements, their gradient) after `prepare_grads()`. No collective."""
        for (shard, item), accumulated in zip(self.owned, self.accumulated, strict=True):
            gradient = shard.gradient()
            if gradient is None:
                for at, zeros in zero_pieces(item.numel, shard.tensor.device):
                    yield accumulated.offset + at, zeros
            else:
                yield accumulated.offset, item.view(gradient)

    def loss_scale(self) -> float:
        """Return 1: `prepare_grads()` has divided by the loss scale."""
        return 1.0

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over all ranks (their owned elements are disjoint). values: 1-D float64. Returns float64 on the CPU."""
        sums = values.to(collective_device())
        dist.all_reduce(sums)
        return sums.cpu()

    def reduce_max(self, values: Tensor) -> Tensor:
        """Maximum over all ranks. values: 1-D uint8 on the CPU, as the result."""
        largest = values.to(collective_device())
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.cpu()

    def discard(self) -> None:
        """Do nothing: the training loop zeroes the gradient buffers before each iteration."""

    def finite(self) -> bool:
        """Return whether every gradient that this rank owns is finite."""
        return all_finite(gradient for _, gradient in self.read())


def collective_device() -> torch.device:
    """Return the device of this rank's gradients and collectives."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _shards(outer: MegatronOptimizer, by_parameter: Mapping[int, LocalParameter]) -> Iterable[Shard]:
    """Yield the shards, without parameters frozen after building the optimizer: `local_parameters` skips them too."""
    kind = type(outer).__name__
    if kind not in WRAPPERS:
        raise MolsUnsupportedError(
            f"MoLS does not support Megatron's {kind}: supported are {', '.join(WRAPPERS)}, chained or alone in a chain"
        )
    if getattr(outer, "is_stub_optimizer", False):
        return
    if kind == "DistributedOptimizer":
        yield from _distributed(outer, by_parameter)
    elif kind == "FP32Optimizer":
        for index, group in enumerate(outer.optimizer.param_groups):
            for parameter in filter(_trained, group["params"]):
                local = _local(by_parameter, parameter)
                yield Shard(local, parameter, local.range.at(0), index)
    else:
        yield from _float16(outer, by_parameter)


def _distributed(outer: MegatronOptimizer, by_parameter: Mapping[int, LocalParameter]) -> Iterable[Shard]:
    """Yield this rank's ranges of the buckets (optimizer/distrib_optimizer.py)."""
    for parameter in filter(_trained, outer.model_param_gbuf_map):
        local = _local(by_parameter, parameter)
        where = outer._get_model_param_range_map(parameter)["param"]
        index, order = outer.model_param_group_index_map[parameter]
        tensor = outer.optimizer.param_groups[index]["params"][order]
        if tensor is None or tensor.numel() != where.size:
            raise MolsUnsupportedError(
                f"the distributed optimizer has no tensor of its own for {local.name!r}: unknown layout"
            )
        yield Shard(local, tensor, local.range.part(int(where.start), int(where.end)).at(0), index)


def _float16(outer: MegatronOptimizer, by_parameter: Mapping[int, LocalParameter]) -> Iterable[Shard]:
    """Yield full fp32 copies of 16-bit parameters, and the fp32 parameters (optimizer/optimizer.py)."""
    group_of = {id(t): i for i, group in enumerate(outer.optimizer.param_groups) for t in group["params"]}
    pairs = [
        *zip(outer.float16_groups, outer.fp32_from_float16_groups, strict=True),
        *((group, group) for group in outer.fp32_from_fp32_groups),
    ]
    for parameters, tensors in pairs:
        for parameter, tensor in zip(parameters, tensors, strict=True):
            if _trained(parameter):
                local = _local(by_parameter, parameter)
                yield Shard(local, tensor, local.range.at(0), group_of[id(tensor)])


def _trained(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def _local(by_parameter: Mapping[int, LocalParameter], parameter: nn.Parameter) -> LocalParameter:
    local = by_parameter.get(id(parameter))
    if local is None:
        raise MolsUnsupportedError(
            f"the optimizer has a parameter of shape {list(parameter.shape)} that no given model chunk has: "
            "pass all chunks of this rank, as to get_megatron_optimizer"
        )
    return local


def _replicas(outer: MegatronOptimizer, shards: Sequence[Shard], grid: ProcessGrid) -> tuple[int, int]:
    """Return (this rank's index, number of ranks) among the ranks with the same shards."""
    if type(outer).__name__ == "DistributedOptimizer":
        instances = int(getattr(outer.ddp_config, "num_distributed_optimizer_instances", 1) or 1)
        return int(getattr(outer, "distributed_optimizer_instance_id", 0)), instances
    if any(shard.local.expert for shard in shards):
        return grid.expert_data_rank, grid.expert_data
    return grid.data_rank, grid.data
