"""State of an engine: whole weights, owners of elements, and digests of everything that training depends on."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from mols_ds.engines.deepspeed.shards import find_shards
from tests.helpers.digests import digest


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer that takes the step."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def step_first_group_only(inner: Any) -> None:
    """From now on the optimizer steps its first parameter group alone."""
    stock = type(inner).step

    def first_group_only(optimizer: Any, closure: Any = None) -> Any:
        groups = optimizer.param_groups
        optimizer.param_groups = groups[:1]
        try:
            return stock.__wrapped__(optimizer, closure)
        finally:
            optimizer.param_groups = groups

    inner.step = torch.optim.Optimizer.profile_hook_step(first_group_only).__get__(inner)


def full_weights(engine: Any) -> dict[str, Tensor]:
    """Copies of the whole parameters, float32, on every rank."""
    result = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            result[name] = parameter.data.float().clone()
    return result


def snapshot(engine: Any) -> dict[str, str]:
    """Digests of all that training depends on: equal means equal bit for bit on this rank.

    Without padding: at stage 3 it is uninitialized memory.
    """
    shards = find_shards(engine)
    inner, outer = shards.inner, shards.outer
    seen = {"random": digest(torch.get_rng_state())}
    for name, p in engine.module.named_parameters():
        held = p.data
        if hasattr(p, "ds_id"):
            length = p.partition_numel()
            rest = max(0, min(length, p.ds_numel - dist.get_rank(p.ds_process_group) * length))
            held = p.ds_tensor.data.view(-1)[:rest]
        seen[f"weight {name}"] = digest(held)
        seen[f"gradient {name}"] = str(p.grad is not None)
    for tensor, pieces in zip(shards.tensors, shards.ranges, strict=True):
        for piece in pieces:
            where = slice(piece.offset, piece.offset + piece.numel)
            seen[f"master {piece.name}"] = digest(tensor.detach().view(-1)[where])
            for key, value in inner.state.get(tensor, {}).items():
                whole = isinstance(value, Tensor) and value.numel() == tensor.numel()
                seen[f"{key} {piece.name}"] = digest(value.view(-1)[where]) if whole else repr(value)
    for number, group in enumerate(inner.param_groups):
        seen[f"group {number}"] = repr({k: v for k, v in group.items() if k != "params"})
    for name in ("loss_scaler", "loss_scale_config"):
        holder = getattr(outer, name, None)
        if holder is not None:
            seen[name] = repr(sorted((k, v) for k, v in vars(holder).items() if isinstance(v, int | float)))
    seen["overflow"] = repr((getattr(outer, "overflow", None), getattr(outer, "local_overflow", None)))
    seen["micro_step_id"] = repr(getattr(outer, "micro_step_id", None))
    scheduler = engine.lr_scheduler
    seen["scheduler"] = repr(sorted(scheduler.state_dict().items())) if scheduler is not None else ""
    seen["counters"] = repr((engine.global_steps, engine.global_samples, engine.skipped_steps))
    seen["micro_steps"] = repr(engine.micro_steps)
    return seen


NOT_SAVED = ("micro_steps", "micro_step_id", "overflow")
"""Keys of `snapshot` that DeepSpeed does not put into a checkpoint, and that do not affect the next update."""


def owned(engine: Any) -> list[tuple[str, int, int, int]]:
    """(parameter, start, numel, numel of the whole parameter) of every piece that this rank's optimizer steps.

    Read from DeepSpeed's own tables, as documented by its 0.19 sources, without the product. Stage 0: everything.
    """
    outer, names, pieces = engine.optimizer, engine.param_names, []
    if hasattr(outer, "fp32_partitioned_groups_flat"):
        for group in outer.fp16_groups:
            for p in group:
                length = outer.grad_position[outer.get_param_id(p)][2]
                start = dist.get_rank(p.ds_process_group) * length
                pieces.append((names[p], start, min(length, p.ds_numel - start), p.ds_numel))
    elif hasattr(outer, "single_partition_of_fp32_groups"):
        for i, group in enumerate(outer.params_in_partition):
            rank = dist.get_rank(outer.real_dp_process_group[i])
            for p in group:
                key = outer.get_param_id(p)
                start = int(outer.grad_start_offset[i][rank][key])
                offset = int(outer.grad_partition_insertion_offset[i][rank][key])
                pieces.append(
                    (names[p], start, min(p.numel() - start, int(outer.partition_size[i]) - offset), p.numel())
                )
    else:
        pieces = [(name, 0, p.numel(), p.numel()) for name, p in engine.module.named_parameters()]
    return [piece for piece in pieces if piece[2] > 0]
