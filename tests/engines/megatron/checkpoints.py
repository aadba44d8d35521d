"""Save and load as Megatron-LM does (training/checkpointing.py)."""

from __future__ import annotations

import os
import queue
from typing import Any

import torch
import torch.distributed as dist

from tests.engines.megatron.building import Built


def metadata(kind: str) -> dict[str, Any]:
    """Arguments of Megatron-LM for `sharded_state_dict`; `kind` is the distributed optimizer's sharding type."""
    from megatron.core import parallel_state

    return {
        "distrib_optim_sharding_type": kind,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _unwrapped(chunk: Any) -> Any:
    while isinstance(getattr(chunk, "module", None), torch.nn.Module):
        chunk = chunk.module
    return chunk


def _sharded(built: Built, optimizer: Any, kind: str, *, is_loading: bool) -> dict[str, Any]:
    names = [f"model{number}" for number in range(len(built.chunks))] if len(built.chunks) > 1 else ["model"]
    about = metadata(kind)
    state = {
        name: _unwrapped(chunk).sharded_state_dict(metadata=about)
        for name, chunk in zip(names, built.chunks, strict=True)
    }
    model = state if len(names) > 1 else state["model"]
    return {**state, "optimizer": optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=about)}


def save(built: Built, optimizer: Any, scheduler: Any, folder: str, kind: str) -> None:
    """Save to a new folder (torch_dist). Collective."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()  # else a server process is spawned for it, a second each
    if dist.get_rank() == 0:
        os.makedirs(folder)
    dist.barrier()
    state = _sharded(built, optimizer, kind, is_loading=False)
    state["opt_param_scheduler"] = scheduler.state_dict()
    dist_checkpointing.save(state, folder, content_metadata={"distrib_optim_sharding_type": kind})
    dist.barrier()


def read(built: Built, optimizer: Any, folder: str, kind: str) -> dict[str, Any]:
    """The state dict of a checkpoint, laid out for this run. Collective."""
    from megatron.core import dist_checkpointing

    result: dict[str, Any] = dist_checkpointing.load(_sharded(built, optimizer, kind, is_loading=True), folder)
    return result


def load(built: Built, optimizer: Any, scheduler: Any, folder: str, kind: str) -> None:
    """Weights, optimizer and scheduler from a checkpoint. Collective."""
    state = read(built, optimizer, folder, kind)
    for number, chunk in enumerate(built.chunks):
        _unwrapped(chunk).load_state_dict(state["model" if len(built.chunks) == 1 else f"model{number}"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["opt_param_scheduler"])
