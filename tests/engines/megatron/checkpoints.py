"""Save and load as Megatron-LM does (training/checkpointing.py), and what of a run must be equal bit for bit."""

from __future__ import annotations

import hashlib
import os
import queue
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mols_ds.errors import MolsWarning
from tests.engines.megatron.building import Built

if "RANK" in os.environ:  # a rank of the harness, not pytest's own process
    sys.modules.setdefault("matplotlib", None)  # type: ignore[arg-type]  # no plots from here: a second for each run


def metadata(kind: str) -> dict[str, Any]:
    """What Megatron-LM hands to `sharded_state_dict`; `kind` is the distributed optimizer's sharding type."""
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


class caught(warnings.catch_warnings):
    """Collects the text of MolsWarnings."""

    def __init__(self) -> None:
        super().__init__(record=True)

    def __enter__(self) -> list[str]:  # type: ignore[override]
        self.found = super().__enter__()
        warnings.simplefilter("always")
        self.texts: list[str] = []
        return self.texts

    def __exit__(self, *error: Any) -> None:
        self.texts += [str(w.message) for w in self.found or [] if issubclass(w.category, MolsWarning)]
        super().__exit__(*error)


def weights(built: Built) -> dict[str, str]:
    """Hash of every parameter of this rank."""
    return {
        f"{number} {name}": digest(parameter)
        for number, chunk in enumerate(built.chunks)
        for name, parameter in chunk.named_parameters()
    }


def fingerprint(built: Built, optimizer: Any, scheduler: Any, mols: Any = None) -> dict[str, Any]:
    """What a resumed run must have in common with one that was not interrupted, of this rank."""
    found: dict[str, Any] = dict(weights(built))
    for number, outer in enumerate(optimizer.chained_optimizers):
        for index, group in enumerate(outer.optimizer.param_groups):
            settings = {key: value for key, value in group.items() if key != "params"}
            found[f"group {number}.{index}"] = repr(sorted(settings.items()))
            for position, tensor in enumerate(group["params"]):
                state = outer.optimizer.state.get(tensor, {})
                found[f"master {number}.{index}.{position}"] = digest(tensor)
                found |= {
                    f"state {number}.{index}.{position} {key}": digest(torch.as_tensor(value))
                    for key, value in state.items()
                }
    found["scheduler"] = None if scheduler is None else scheduler.num_steps
    if mols is not None:
        moments = mols.controller.elements.accumulators
        found["mols"] = (mols.phase, mols.steps, mols.samples, mols.alphas)
        found["rates"] = mols.controller.rates(mols.steps)
        found["report"] = repr(mols.report())
        found["accumulators"] = None if moments is None else (digest(moments.mean), digest(moments.m2), moments.count)
        saved = mols.random.saved
        found["random"] = None if saved is None else (digest(saved["torch"]), sorted(saved["tracker"]))
    return found


def digest(tensor: Tensor) -> str:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Keys whose values are not the same."""
    return sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
