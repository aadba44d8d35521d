"""Digests of a Megatron run's state: equal digests mean equal bits on this rank."""

from __future__ import annotations

from typing import Any

import torch

from tests.engines.megatron.building import Built
from tests.helpers.digests import digest


def fingerprint(built: Built, optimizer: Any, scheduler: Any, mols: Any = None) -> dict[str, Any]:
    """Weights, optimizer, parameter groups and scheduler of this rank, and the state of MoLS if given.

    The state of the random generators is not in it: see `random_state`.
    """
    found: dict[str, Any] = {
        f"weight {number} {name}": digest(parameter)
        for number, chunk in enumerate(built.chunks)
        for name, parameter in chunk.named_parameters()
    }
    for number, outer in enumerate(optimizer.chained_optimizers):
        if getattr(outer, "is_stub_optimizer", False):
            continue
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
        saved = mols.window.state_dict()
        found["window"] = saved and (digest(saved["stream"][0]), sorted(saved["engine"]["tracker"]))
    return found


def everything(built: Built, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """As `fingerprint`, and the random generators that dropout draws from."""
    return {**fingerprint(built, optimizer, scheduler), "random": random_state()}


def random_state() -> str:
    """Of the CPU generator and of Megatron's tensor-parallel tracker."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker().get_states()
    return " ".join(
        [digest(torch.get_rng_state()), *(f"{key} {digest(value)}" for key, value in sorted(tracker.items()))]
    )
