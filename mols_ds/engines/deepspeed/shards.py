"""Shards of each ZeRO layout. The only file that reads DeepSpeed's optimizers (names: compat.py).

One class per layout has: the inner tensors that the inner optimizer steps, the parameter elements in them, how to
read and discard this rank's reduced gradient at an accumulation boundary, and the factor from an inner `.grad` to the
unscaled, unclipped gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from mols_ds.core.pieces import FlatList, Parts, all_finite, zero_pieces
from mols_ds.core.ranges import ShardRange, pack, split_among_replicas
from mols_ds.engines.deepspeed.compat import Engine
from mols_ds.engines.deepspeed.parallel.base import ParallelGrid, whole_places
from mols_ds.engines.deepspeed.zero_shards import ZeroShards
from mols_ds.errors import MolsUnsupportedError


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

    def read(self) -> Parts:
        o = self.outer
        if o.cpu_offload:
            o._wait_for_offload_copies()
        for i, flat in enumerate(self.tensors):
            if o.cpu_offload:
                gradient: Any = flat.grad
            else:
                shards = o.averaged_gradients[i]
                gradient = getattr(shards, "flat_partition", None)
                gradient = shards if gradient is None else gradient
            yield from self.owned_parts(flat, gradient)

    def begin(self) -> None:
        if self.outer.micro_step_id < 0:
            self._forget_gradients()

    def _forget_gradients(self) -> None:
        """Zero gradients as at stage 3: with offload, an unused parameter keeps the gradient of an earlier batch."""
        o = self.outer
        if o.cpu_offload:
            o._wait_for_offload_copies()
            for gradient in (*(flat.grad for flat in self.tensors), *o.accumulated_grads_in_cpu.values()):
                if gradient is not None:
                    gradient.zero_()

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
    """ZeRO stage 3 with sub-groups, CPU and NVMe offload (runtime/zero/stage3.py). Never gathers parameters."""

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

        self._index = {id(flat): i for i, flat in enumerate(self.tensors)}

    def loss_scale(self) -> float:
        return float(self.outer.loss_scale)

    def _norm_scale(self, before: float, after: float) -> float:
        return after

    def read(self) -> Parts:
        o = self.outer
        for i, flat in enumerate(self.tensors):
            if o._swappable_optimizer_subgroup(i):
                yield from self._read_swapped(i, flat)
            else:
                yield from self.owned_parts(flat, flat.grad if o.offload_optimizer else o.averaged_gradients[i])

    def _read_swapped(self, i: int, flat: Tensor) -> Parts:
        """Read one sub-group from NVMe. Releases its buffers even if the reader, or reading, raises."""
        o = self.outer
        try:
            o._optimizer_states_and_gradient_swap_in(i)
            yield from self.owned_parts(flat, flat.grad)
        finally:
            o._release_swap_buffers(i)

    def owned_parts(self, tensor: Tensor, gradient: Tensor | Sequence[Tensor] | None) -> Parts:
        index = self._index.get(id(tensor))
        if index is not None and self.outer._swappable_optimizer_subgroup(index):
            yield from self._swapped_parts(index, tensor, gradient)
        else:
            yield from super().owned_parts(tensor, gradient)

    def _swapped_parts(self, i: int, tensor: Tensor, gradient: Tensor | Sequence[Tensor] | None) -> Parts:
        """Yield parts of a sub-group from NVMe, with zeros for parameters that this batch did not use.

        For such a parameter DeepSpeed reads the file of an earlier batch, or leaves other data in the buffer
        (swap_tensor/optimizer_utils.py). Writes the zeros in place: the next step uses them.
        """
        if not isinstance(gradient, Tensor):  # no batch has used a parameter of this sub-group so far
            for span in self._spans.get(id(tensor), []):
                for at, zeros in zero_pieces(span.numel):
                    yield span.target + at, zeros
            return
        o = self.outer
        for p in o.fp16_groups[i]:
            key = o.get_param_id(p)
            if key not in o.norm_for_param_grads:  # this batch gave no gradient for it
                _, offset, share = o.grad_position[key]
                gradient.narrow(0, int(offset), int(share)).zero_()
        yield from super().owned_parts(tensor, gradient)

    def begin(self) -> None:
        o = self.outer
        if o.micro_step_id == 0 and not getattr(o, "_epilogue_ran_this_backward", False):
            self._forget_gradients()

    def _forget_gradients(self) -> None:
        """Zero gradients of earlier batches. A batch does not overwrite the gradient of an unused parameter, so it
        would be read and stepped again. (NVMe: `_swapped_parts`, `_forget_swapped`.)"""
        o = self.outer
        o.grad_partitions_flat_buffer.zero_()
        for i, flat in enumerate(self.tensors):
            if o.offload_optimizer and flat.grad is not None and not o._swappable_optimizer_subgroup(i):
                flat.grad.zero_()

    def _forget_swapped(self, i: int, flat: Tensor) -> None:
        """Write zeros to the gradients of a sub-group on NVMe, for parameters that the next batch does not write."""
        o = self.outer
        try:
            o._optimizer_states_and_gradient_swap_in(i)
            if flat.grad is not None:
                flat.grad.zero_()
                o._writeback_swap_state(i, write_opt_state=False, write_gradients=True)
        finally:
            o._release_swap_buffers(i)

    def discard(self) -> None:
        o = self.outer
        o._pre_step()
        self._forget_gradients()
        for i, flat in enumerate(self.tensors):
            if o._swappable_optimizer_subgroup(i):
                self._forget_swapped(i, flat)
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

    def read(self) -> Parts:
        for flat, gradient in zip(self.tensors, self.outer.fp32_groups_gradient_flat_partition, strict=True):
            yield from self.owned_parts(flat, gradient)

    def discard(self) -> None:
        self.outer.zero_grad(set_to_none=True)

    def _undo(self, norm: float, scale_before: float) -> float:
        clip = float(self.outer.clip_grad)
        return max(1.0, (norm + 1e-6) / clip) if clip > 0 else 1.0


class Replicated(ZeroShards):
    """Stage 0. Data-parallel ranks have the same gradients, so they split the elements.

    The inner optimizer is the client's (fp32), or DeepSpeed's fp16/bf16 wrapper with per-parameter or flat fp32 copies
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
        """This rank's share of the elements that its data-parallel replicas count."""
        group = self.engine.seq_data_parallel_group
        return split_among_replicas(super()._owned(), dist.get_rank(group), dist.get_world_size(group))

    def read(self) -> Parts:
        gradients = {self._name(p): p.grad for p in self.params}
        starts = {self._name(p): self.places[p].range.start for p in self.params}
        for item in self.accumulated:
            gradient = gradients[item.name]
            if gradient is None:
                pieces = zero_pieces(item.numel)
            else:
                pieces = FlatList([gradient]).pieces(item.start - starts[item.name], item.numel)
            for at, piece in pieces:
                yield item.offset + at, piece

    def finite(self) -> bool:
        """Whether all gradients are finite, not only this rank's share; replicas give the same answer."""
        return all_finite(p.grad for p in self.params if p.grad is not None)

    def lower_scale(self) -> bool:
        """Return False: the loss has no scale to lower."""
        return False

    def discard(self) -> None:
        if self.outer is self.inner:
            self.engine.zero_grad()
        else:
            self.outer.zero_grad(set_to_none=True)


def find_shards(engine: Engine, grid: ParallelGrid | None = None) -> ZeroShards:
    """Return the shards of this engine. Without `grid`: under data parallelism alone.

    Raises:
        MolsUnsupportedError: an unknown optimizer wrapper; names it.
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
