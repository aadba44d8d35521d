"""Refuse optimizers, models and settings that MoLS does not support on plain torch. Names each and what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mols_ds.core.config import MolsConfig
from mols_ds.errors import MolsUnsupportedError
from mols_ds.optim.refusals import Refusal, optimizer_refusals
from mols_ds.optim.sharded import ShardedOptimizer

OPTIMIZERS_THAT_SHARD = ("ZeroRedundancyOptimizer",)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of DDP's and torch.compile's wrappers."""
    while True:
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def check_supported(optimizers: Sequence[Optimizer], model: nn.Module, config: MolsConfig) -> None:
    """Raise `MolsUnsupportedError` for a model or optimizer with which training would be silently wrong."""
    held = [{id(p) for group in one.param_groups for p in group["params"]} for one in optimizers]
    twice = (
        sum(map(len, held)) > len(set().union(*held)),
        "a parameter in several of the optimizers, which would step it twice",
        "give each parameter to one optimizer, and each optimizer once",
    )
    every = [twice, *_model_refusals(model)]
    for optimizer in optimizers:
        every += [*_refusals(optimizer), *optimizer_refusals(optimizer, config)]
    for refuse, what, way_out in every:
        if refuse:
            raise MolsUnsupportedError(f"MoLS does not support {what}: {way_out}")


def _model_refusals(model: nn.Module) -> list[Refusal]:
    return [
        (
            any(isinstance(one, FullyShardedDataParallel) for one in model.modules()),
            "FullyShardedDataParallel (FSDP1), whose parameters are parts of flat tensors",
            "use torch.distributed.fsdp.fully_shard",
        ),
        (
            any(isinstance(one, nn.DataParallel) for one in model.modules()),
            "nn.DataParallel",
            "use DistributedDataParallel",
        ),
        (
            any(isinstance(one, nn.Embedding | nn.EmbeddingBag) and one.sparse for one in model.modules()),
            "sparse gradients (an embedding with sparse=True)",
            "set sparse=False there",
        ),
        (
            any(p.is_meta for p in model.parameters()),
            "parameters without values (on the device meta)",
            "call attach after to_empty and the initialization, and build the optimizer after them too",
        ),
    ]


def _refusals(optimizer: Optimizer) -> list[Refusal]:
    name = type(optimizer).__name__
    groups = optimizer.param_groups
    return [
        (
            name in OPTIMIZERS_THAT_SHARD,
            f"{name} (each rank steps other parameters, inside of it)",
            "use torch.distributed.fsdp.fully_shard, or DistributedDataParallel with the optimizer itself",
        ),
        (
            isinstance(optimizer, ShardedOptimizer),
            f"{name} of this package on a plain torch optimizer (DeepSpeed's engine tells it the shards)",
            "use it with mols_ds.initialize, or AdamW here",
        ),
        (
            any(group.get("capturable") for group in groups),
            f"{name} with capturable=True (a CUDA graph replays a step without asking for its rates)",
            "set capturable=False",
        ),
        (
            any(group.get("lr") is None for group in groups),
            f"{name} with lr None (it sets its own rate)",
            "give it an lr to scale",
        ),
        (
            any(isinstance(p, torch.Tensor) and p.is_sparse for group in groups for p in group["params"]),
            "sparse parameters",
            "use dense ones",
        ),
    ]
