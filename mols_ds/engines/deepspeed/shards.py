"""Where each ZeRO layout keeps its shards: the only file that reads DeepSpeed's optimizers (names: compat.py).

One class per layout says: which inner tensors the inner optimizer steps, where in them which parameter elements are,
how to read this rank's reduced gradient at an accumulation boundary, how to throw it away, and by which factor an inner
`.grad` must be multiplied to become the unscaled, unclipped gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from mols_ds.core.ranges import ShardRange, pack, spans_to_accumulators, split_among_replicas
from mols_ds.engines.deepspeed.compat import Engine, check_optimizer
from mols_ds.engines.deepspeed.parallel.base import ParallelGrid, Place, whole_places
from mols_ds.errors import MolsUnsupportedError


class ZeroShards(ABC):
    """The shards of one engine on this rank.

    Attributes:
        tensors: what the inner optimizer steps; their identity is stable for the engine's life.
        sizes: number of elements of each (a tensor on NVMe is empty between steps).
        ranges: per tensor, the parameter elements in it; what no range covers is padding (and may be garbage).
        owned: (number of the tensor, range in it) of the elements whose statistics this rank keeps: all, or its share
            where ranks hold replicas; in the order of its accumulators.
        accumulated: the ranges of `owned` as they are in the accumulators.
        param_group: parameter name -> index of its group in `inner.param_groups`.
    """

    reads_before_clipping = False
    """Whether online samples are read at the entry of the step; otherwise in the inner optimizer's step hook."""

    def __init__(self, engine: Engine, places: Mapping[nn.Parameter, Place], group: object = None) -> None:
        self.engine = engine
        self.group = group
        self.outer = engine.optimizer
        self.inner = getattr(self.outer, "optimizer", self.outer)
        check_optimizer(self.outer)
        self.places = places
        self.tensors: list[Tensor] = []
        self.sizes: list[int] = []
        self.ranges: list[list[ShardRange]] = []
        self.param_group: dict[str, int] = {}
        self._collect()
        self.owned = self._owned()
        self.accumulated = pack(item for _, item in self.owned)
        self._spans = {id(self.tensors[i]): spans for i, spans in spans_to_accumulators(self.owned).items()}

    def _name(self, param: nn.Parameter) -> str:
        return self.places[param].range.name

    def _range(self, param: nn.Parameter, low: int, high: int, offset: int) -> ShardRange:
        """Elements low to high of the local parameter, as far as it has them, which are at `offset` of a tensor."""
        return self.places[param].range.part(low, high).at(offset)

    def _add(self, tensor: Tensor, size: int, ranges: list[ShardRange]) -> None:
        self.tensors.append(tensor)
        self.sizes.append(size)
        self.ranges.append([item for item in ranges if item.numel > 0])

    @abstractmethod
    def _collect(self) -> None:
        """Fill tensors, sizes, ranges and param_group."""

    def _owned(self) -> list[tuple[int, ShardRange]]:
        uncounted = {place.range.name for place in self.places.values() if not place.counted}
        return [(i, item) for i, ranges in enumerate(self.ranges) for item in ranges if item.name not in uncounted]

    def owned_parts(self, tensor: Tensor, gradient: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """(offset among the owned elements, 1-D gradient) of the owned ranges of one inner tensor.

        gradient: that of all its elements; may be None where this rank owns none of them.
        """
        for span in self._spans.get(id(tensor), []):
            assert gradient is not None, "an owned inner tensor has no gradient"
            yield span.target, gradient.view(-1).narrow(0, span.source, span.numel)

    @abstractmethod
    def read(self) -> Iterator[tuple[int, Tensor]]:
        """(offset among the owned elements, 1-D gradient) at the boundary, still loss-scaled; no collective."""

    def reduce(self, values: Tensor) -> Tensor:
        """SUM over the ranks whose owned elements are disjoint. 1-D float64 in, CPU float64 out."""
        sums = values.to(get_accelerator().current_device_name())
        dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=self.group)
        return sums.cpu()

    def finite(self) -> bool:
        """Whether the gradient that this rank reads is finite. Reads all of it, so that NVMe buffers are released."""
        flags = [bool(torch.isfinite(gradient).all()) for _, gradient in self.read()]
        return all(flags)

    @abstractmethod
    def discard(self) -> None:
        """Throw the accumulated gradient away, as if the engine had never seen these batches."""

    def begin(self) -> None:  # noqa: B027  (most layouts keep nothing)
        """Before the first forward pass of a batch that is measured: forget gradients of former batches."""

    def lower_scale(self) -> bool:
        """After a gradient that is not finite on any rank: lower a dynamic loss scale, as a skipped step does.

        Returns False for a static scale, and for one at its minimum (DeepSpeed would end the run there).
        """
        outer = self.outer
        scaler: Any = getattr(outer, "loss_scale_config", None) or getattr(outer, "loss_scaler", None)
        dynamic = getattr(scaler, "dynamic_loss_scale", None) or getattr(scaler, "dynamic", False)
        lowest = getattr(scaler, "min_loss_scale", None) or getattr(scaler, "min_scale", None) or 1.0
        if not dynamic or float(scaler.cur_scale) <= lowest:
            return False
        outer._update_scale(True)
        return True

    def loss_scale(self) -> float:
        """What the gradients that `read` gives are multiplied by."""
        return 1.0

    def undo_factor(self, scale_before: float) -> float:
        """inner `.grad` x this = the unscaled, unclipped gradient; NaN where the gradient is not finite.

        `scale_before` is the loss scale at the entry of the step: DeepSpeed grows a dynamic scale before it unscales,
        and then divides by the new one.
        """
        norm = getattr(self.outer, "_global_grad_norm", None)
        if norm is None:
            raise MolsUnsupportedError(
                "zero_optimization.compute_grad_norm=false leaves no gradient norm to undo clipping by and to see "
                'non-finite gradients with; remove it, or use "mode": "probe"'
            )
        norm = float(norm)
        if not math.isfinite(norm) or norm < 0:
            return math.nan
        return self._undo(norm, scale_before)

    def _undo(self, norm: float, scale_before: float) -> float:
        scale = float(self.outer.loss_scale)
        clip = float(self.outer.clip_grad)
        if clip <= 0:
            return scale / scale_before
        scaled_norm = norm * self._norm_scale(scale_before, scale)
        return scale * max(1.0, (scaled_norm / scale + 1e-6) / clip) / scale_before

    def _norm_scale(self, before: float, after: float) -> float:
        """The scale that `_global_grad_norm` was divided by."""
        return before


class Stage12(ZeroShards):
    """ZeRO stages 1 and 2, CPU offload included (runtime/zero/stage_1_and_2.py)."""

    def _collect(self) -> None:
        o = self.outer
        for i, flat in enumerate(o.single_partition_of_fp32_groups):
            rank = dist.get_rank(o.real_dp_process_group[i])
            ranges = []
            for p in o.params_in_partition[i]:
                key = o.get_param_id(p)
                start = int(o.grad_start_offset[i][rank][key])
                offset = int(o.grad_partition_insertion_offset[i][rank][key])
                ranges.append(self._range(p, start, start + int(o.partition_size[i]) - offset, offset))
            self._add(flat, flat.numel(), ranges)
            self.param_group |= {self._name(p): i for p in o.bit16_groups[i]}

    def loss_scale(self) -> float:
        return float(self.outer.loss_scale)

    def read(self) -> Iterator[tuple[int, Tensor]]:
        o = self.outer
        if o.cpu_offload:
            o._wait_for_offload_copies()
        for i, flat in enumerate(self.tensors):
            if o.cpu_offload:
                gradient: Any = flat.grad
            else:
                shards = o.averaged_gradients[i]
                gradient = getattr(shards, "flat_partition", None)
                if gradient is None:
                    gradient = torch.cat([g.reshape(-1) for g in shards])
            yield from self.owned_parts(flat, gradient)

    def begin(self) -> None:
        if self.outer.micro_step_id < 0:
            self._forget_gradients()

    def _forget_gradients(self) -> None:
        """As at stage 3: with offload, a parameter that a batch does not use keeps the gradient of a former one."""
        if self.outer.cpu_offload:
            self.outer._wait_for_offload_copies()
            for flat in self.tensors:
                if flat.grad is not None:
                    flat.grad.zero_()

    def discard(self) -> None:
        o = self.outer
        self._forget_gradients()
        o.zero_grad(set_to_none=True)
        o.micro_step_id = -1
        o._release_preflattened_grad_buffers()
        if o.cpu_offload:
            o._offload_accumulated_param_ids = set()
            o.reset_cpu_buffers()
        else:
            for i in o.averaged_gradients:
                o.averaged_gradients[i] = o.all_grad_tensors[i] = None


class Stage3(ZeroShards):
    """ZeRO stage 3 with sub-groups, CPU and NVMe offload (runtime/zero/stage3.py). Nothing is ever gathered."""

    def _collect(self) -> None:
        o = self.outer
        for i, flat in enumerate(o.fp32_partitioned_groups_flat):
            ranges = []
            for p in o.fp16_groups[i]:
                _, offset, share = o.grad_position[o.get_param_id(p)]
                start = dist.get_rank(p.ds_process_group) * share
                ranges.append(self._range(p, start, start + share, int(offset)))
            self._add(flat, int(o.fp16_partitioned_groups_flat_numel[i]), ranges)
            self.param_group |= {self._name(p): o.sub_group_to_group_id[i] for p in o.fp16_groups[i]}

    def loss_scale(self) -> float:
        return float(self.outer.loss_scale)

    def _norm_scale(self, before: float, after: float) -> float:
        return after

    def read(self) -> Iterator[tuple[int, Tensor]]:
        o = self.outer
        for i, flat in enumerate(self.tensors):
            swapped = o._swappable_optimizer_subgroup(i)
            if swapped:
                o._optimizer_states_and_gradient_swap_in(i)
            if swapped or o.offload_optimizer:
                gradient: Any = flat.grad
            else:
                gradient = torch.cat([g.reshape(-1) for g in o.averaged_gradients[i]])
            yield from self.owned_parts(flat, gradient)
            if swapped:
                o._release_swap_buffers(i)

    def begin(self) -> None:
        o = self.outer
        if o.micro_step_id == 0 and not getattr(o, "_epilogue_ran_this_backward", False):
            self._forget_gradients()

    def _forget_gradients(self) -> None:
        """Zero what DeepSpeed keeps of former batches. The gradient of a parameter that a batch does not use is not
        overwritten, and would be read, and stepped with, once more. (Gradients on NVMe stay.)"""
        o = self.outer
        o.grad_partitions_flat_buffer.zero_()
        for i, flat in enumerate(self.tensors):
            if o.offload_optimizer and flat.grad is not None and not o._swappable_optimizer_subgroup(i):
                flat.grad.zero_()

    def discard(self) -> None:
        o = self.outer
        o._pre_step()
        self._forget_gradients()
        o._partition_all_parameters()
        o.zero_grad(set_to_none=True)
        if o.offload_optimizer:
            o.reset_cpu_buffers()
        else:
            o.averaged_gradients = {}
        if len(o.persistent_parameters) > 0:
            o.persistent_parameters[0].all_gather(o.persistent_parameters)


class Bf16(ZeroShards):
    """BF16_Optimizer: stage 1, bf16 with fp32 gradient accumulation (runtime/bf16_optimizer.py)."""

    def _collect(self) -> None:
        o = self.outer
        for i, flat in enumerate(o.fp32_groups_flat_partition):
            ranges = []
            for p in o.bf16_groups[i]:
                if p._hp_mapping is not None:
                    low, high = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
                    ranges.append(self._range(p, low.start, low.start + low.numel, high.start))
            self._add(flat, flat.numel(), ranges)
            self.param_group |= {self._name(p): i for p in o.bf16_groups[i]}

    def read(self) -> Iterator[tuple[int, Tensor]]:
        for flat, gradient in zip(self.tensors, self.outer.fp32_groups_gradient_flat_partition, strict=True):
            yield from self.owned_parts(flat, gradient)

    def discard(self) -> None:
        self.outer.zero_grad(set_to_none=True)

    def _undo(self, norm: float, scale_before: float) -> float:
        clip = float(self.outer.clip_grad)
        return max(1.0, (norm + 1e-6) / clip) if clip > 0 else 1.0


class Replicated(ZeroShards):
    """Stage 0: data-parallel ranks hold the same gradients, so they split the elements among them.

    The client optimizer itself (fp32), or DeepSpeed's fp16/bf16 wrappers with per-parameter or flat fp32 copies
    (runtime/fp16/unfused_optimizer.py, fused_optimizer.py). Stage 0 does not scale the loss in `engine.backward`.
    """

    reads_before_clipping = True

    def _collect(self) -> None:
        self.params: list[nn.Parameter] = []
        if hasattr(self.outer, "fp32_groups_flat"):
            self._collect_flat()
        elif hasattr(self.outer, "fp32_groups"):
            for i, (low, high) in enumerate(zip(self.outer.fp16_groups, self.outer.fp32_groups, strict=True)):
                for p, copy in zip(low, high, strict=True):
                    self._one(p, copy, i)
        else:
            for i, group in enumerate(self.inner.param_groups):
                for p in group["params"]:
                    if p.requires_grad:
                        self._one(p, p, i)

    def _one(self, param: nn.Parameter, tensor: Tensor, group: int) -> None:
        self._add(tensor, param.numel(), [self.places[param].range.at(0)])
        self.param_group[self._name(param)] = group
        self.params.append(param)

    def _collect_flat(self) -> None:
        for i, (params, flat) in enumerate(zip(self.outer.fp16_groups, self.outer.fp32_groups_flat, strict=True)):
            self._add(flat, flat.numel(), pack(self.places[p].range.at(0) for p in params))
            self.params += params
            self.param_group |= {self._name(p): i for p in params}

    def _owned(self) -> list[tuple[int, ShardRange]]:
        """This rank's share of what is counted among its data-parallel replicas."""
        group = self.engine.seq_data_parallel_group
        return split_among_replicas(super()._owned(), dist.get_rank(group), dist.get_world_size(group))

    def read(self) -> Iterator[tuple[int, Tensor]]:
        gradients = {self._name(p): p.grad for p in self.params}
        starts = {self._name(p): self.places[p].range.start for p in self.params}
        for item in self.accumulated:
            gradient = gradients[item.name]
            if gradient is None:
                yield item.offset, torch.zeros(item.numel)
            else:
                yield item.offset, gradient.reshape(-1).narrow(0, item.start - starts[item.name], item.numel)

    def finite(self) -> bool:
        """Whether every gradient, this rank's part or not, is finite; data-parallel replicas give the same answer."""
        return all(bool(torch.isfinite(p.grad).all()) for p in self.params if p.grad is not None)

    def discard(self) -> None:
        if self.outer is self.inner:
            self.engine.zero_grad()
        else:
            self.outer.zero_grad(set_to_none=True)


def find_shards(engine: Engine, grid: ParallelGrid | None = None) -> ZeroShards:
    """The layout of this engine; without `grid` that of data parallelism alone.

    Raises `MolsUnsupportedError`, naming the wrapper, where none is known.
    """
    outer = engine.optimizer
    kinds: dict[str, type[ZeroShards]] = {
        "DeepSpeedZeroOptimizer": Stage12,
        "DeepSpeedZeroOptimizer_Stage3": Stage3,
        "BF16_Optimizer": Bf16,
        "FP16_UnfusedOptimizer": Replicated,
        "FP16_Optimizer": Replicated,
    }
    kind = kinds.get(type(outer).__name__)
    if kind is None and isinstance(outer, torch.optim.Optimizer):
        kind = Replicated
    if kind is None:
        raise MolsUnsupportedError(
            f"DeepSpeed's optimizer wrapper {type(outer).__name__} is not supported; "
            f"supported are ZeRO 0-3: {', '.join(kinds)}, or the client optimizer itself"
        )
    if grid is None:
        return kind(engine, whole_places(engine), engine.seq_data_parallel_group)
    return kind(engine, grid.places, grid.group)
