"""Where Megatron's optimizers keep their shards: the only file that uses private names of megatron.core.optimizer.

Megatron chains one optimizer for the dense and one for the expert parameters. Each steps an inner torch optimizer over
its own tensors: flat fp32 ranges of the parameters (`DistributedOptimizer`), whole fp32 copies
(`Float16OptimizerWithFloat16Params`) or the parameters themselves (`FP32Optimizer`). After `prepare_grads()` each
tensor's gradient is reduced over the data-parallel ranks, unscaled and not yet clipped.

Who counts: a rank measures the elements it owns such that each logical element is owned once in the whole world. Copies
over tensor- and pipeline-parallel ranks are settled in param_map.py; data-parallel replicas (plain DDP, several
distributed-optimizer instances) split the elements among them. So one SUM over all ranks gives the global sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_patches.param_map import LocalParameter, ProcessGrid
from mols_ds.core.pieces import Parts, all_finite, gradient_of, zero_pieces
from mols_ds.core.ranges import ShardRange, pack, split_among_replicas
from mols_ds.errors import MolsUnsupportedError

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

KINDS = ("DistributedOptimizer", "Float16OptimizerWithFloat16Params", "FP32Optimizer")


@dataclass(frozen=True, slots=True)
class Shard:
    """One tensor that an inner optimizer steps.

    range: the elements of a logical parameter that it consists of; at its offset 0.
    group: index of its parameter group in the inner optimizer.
    """

    local: LocalParameter
    tensor: Tensor
    range: ShardRange
    group: int

    def gradient(self) -> Tensor | None:
        """The reduced gradient after `prepare_grads()`, 1-D; precision-aware optimizers keep it apart."""
        gradient = gradient_of(self.tensor)
        return None if gradient is None else gradient.detach().reshape(-1)


class ChainedPart:
    """One of the chained optimizers with the shards of this rank.

    idle: what the inner optimizer steps for parameters that are frozen now.
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
        parts: the chained optimizers, in their order.
        owned: (shard, range in its tensor) of the elements whose statistics this rank keeps, in the order of its
            accumulators.
        accumulated: the ranges of `owned` as they are in the accumulators.

    Raises:
        MolsUnsupportedError: an optimizer of another kind, or a parameter of the optimizer that no model chunk has.
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
        """(offset among the owned elements, gradient of those elements) after `prepare_grads()`; no collective."""
        for (shard, item), accumulated in zip(self.owned, self.accumulated, strict=True):
            gradient = shard.gradient()
            if gradient is None:
                for at, zeros in zero_pieces(item.numel, shard.tensor.device):
                    yield accumulated.offset + at, zeros
            else:
                yield accumulated.offset, item.view(gradient)

    def loss_scale(self) -> float:
        """1: `prepare_grads()` has divided the loss scale out."""
        return 1.0

    def reduce(self, values: Tensor) -> Tensor:
        """SUM over all ranks, whose owned elements are disjoint. 1-D float64 in, CPU float64 out."""
        sums = values.to(collective_device())
        dist.all_reduce(sums)
        return sums.cpu()

    def discard(self) -> None:
        """Nothing: the training loop zeroes the gradient buffers before each iteration."""

    def finite(self) -> bool:
        """Whether every gradient that this rank owns is finite."""
        return all_finite(gradient for _, gradient in self.read())


def collective_device() -> torch.device:
    """Where this rank's gradients and collectives are."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _shards(outer: MegatronOptimizer, by_parameter: Mapping[int, LocalParameter]) -> Iterable[Shard]:
    """Without the parameters that were frozen after the optimizer was made, which `local_parameters` leaves out too."""
    kind = type(outer).__name__
    if kind not in KINDS:
        raise MolsUnsupportedError(
            f"MoLS does not support Megatron's {kind}: supported are {', '.join(KINDS)}, chained or alone in a chain"
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
    """Ranges of the bucket that this rank owns (optimizer/distrib_optimizer.py)."""
    for parameter in filter(_trained, outer.model_param_gbuf_map):
        local = _local(by_parameter, parameter)
        where = outer._get_model_param_range_map(parameter)["param"]
        index, order = outer.model_param_group_index_map[parameter]
        tensor = outer.optimizer.param_groups[index]["params"][order]
        if tensor is None or tensor.numel() != where.size:
            raise MolsUnsupportedError(
                f"the distributed optimizer holds no tensor of its own for {local.name!r}: unknown layout"
            )
        yield Shard(local, tensor, local.range.part(int(where.start), int(where.end)).at(0), index)


def _float16(outer: MegatronOptimizer, by_parameter: Mapping[int, LocalParameter]) -> Iterable[Shard]:
    """Whole fp32 copies of 16-bit parameters, and fp32 parameters themselves (optimizer/optimizer.py)."""
    group_of = {id(t): i for i, group in enumerate(outer.optimizer.param_groups) for t in group["params"]}
    pairs = [
        *zip(outer.float16_groups, outer.fp32_from_float16_groups, strict=True),
        *((group, group) for group in outer.fp32_from_fp32_groups),
    ]
    for parameters, tensors in pairs:
        for parameter, tensor in zip(parameters, tensors, strict=True):
            if not _trained(parameter):
                continue
            local = _local(by_parameter, parameter)
            yield Shard(local, tensor, local.range.at(0), group_of[id(tensor)])


def _trained(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def _local(by_parameter: Mapping[int, LocalParameter], parameter: nn.Parameter) -> LocalParameter:
    local = by_parameter.get(id(parameter))
    if local is None:
        raise MolsUnsupportedError(
            f"the optimizer holds a parameter of shape {list(parameter.shape)} that no given model chunk has: "
            "pass all chunks of this rank, those that get_megatron_optimizer was given"
        )
    return local


def _replicas(outer: MegatronOptimizer, shards: Sequence[Shard], grid: ProcessGrid) -> tuple[int, int]:
    """(this rank's number among the ranks that hold the same shards, how many they are)."""
    if type(outer).__name__ == "DistributedOptimizer":
        instances = int(getattr(outer.ddp_config, "num_distributed_optimizer_instances", 1) or 1)
        return int(getattr(outer, "distributed_optimizer_instance_id", 0)), instances
    if any(shard.local.expert for shard in shards):
        return grid.expert_data_rank, grid.expert_data
    return grid.data_rank, grid.data
