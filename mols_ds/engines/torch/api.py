"""Entry point: `mols_ds.attach(optimizer, model, section, total_steps=N)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mols_ds.core.config import MolsConfig
from mols_ds.core.handle import Handle
from mols_ds.core.protocols import window_of_others_schedule
from mols_ds.engines.torch.engine import TorchMols
from mols_ds.engines.torch.off import TorchOff
from mols_ds.errors import MolsConfigError, MolsError, MolsUnsupportedError

WRAPPERS = ("AcceleratedOptimizer", "LightningOptimizer")
"""Classes around an optimizer that call its `step`."""


def attach(
    optimizer: Any,
    model: object,
    section: Mapping[str, object] | MolsConfig | None,
    total_steps: int | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
    announce: Callable[[int], str] = window_of_others_schedule,
) -> Handle:
    """See `mols_ds.attach`. announce: as in `protocols.Context`."""
    if not isinstance(model, nn.Module):
        raise MolsConfigError(
            f"mols_ds.attach: the model is a {type(model).__name__}, not an nn.Module: "
            'mols_ds.attach(optimizer, model, {"mode": "probe", ...}, total_steps=N)'
        )
    if section is None:
        raise MolsConfigError('mols_ds.attach: no "mols" section; pass one after the model, {} for the defaults')
    config = MolsConfig.parse(section)
    total_steps = MolsConfig.parse({"total_steps": total_steps}).total_steps
    if total_steps is not None and config.total_steps not in (None, total_steps):
        raise MolsConfigError(
            f'mols_ds.attach: total_steps is {total_steps}, and "mols.total_steps" {config.total_steps}: give one'
        )
    if not isinstance(grad_scaler, torch.amp.GradScaler | None):
        raise MolsConfigError(f"mols_ds.attach: grad_scaler is a {type(grad_scaler).__name__}, not a GradScaler")
    optimizers = optimizers_of(optimizer)
    if any(isinstance(getattr(one, "mols", None), TorchMols) for one in optimizers):
        raise MolsError("this optimizer has MoLS already; call optimizer.mols.detach() first")
    if not config.enabled:
        return TorchOff(optimizers)
    return TorchMols(optimizers, model, config, total_steps, grad_scaler, announce)


def optimizers_of(given: Any) -> list[Optimizer]:
    """Return the torch optimizers of one, of a list of them, or of a container with `.optimizers` (torchtitan).

    Raises:
        MolsConfigError: there is none.
        MolsUnsupportedError: a container whose optimizers step inside of the backward pass.
    """
    if type(given).__name__ == "OptimizersInBackwardContainer":
        raise MolsUnsupportedError(
            "MoLS does not support optimizers that step inside of the backward pass (OptimizersInBackwardContainer): "
            "set early_step_in_backward to false"
        )
    inner = getattr(given, "optimizers", None)
    if isinstance(inner, Iterable):
        given = inner
    every: list[Any] = [given] if isinstance(given, Optimizer) else list(given) if isinstance(given, Iterable) else []
    found = [one.optimizer if type(one).__name__ in WRAPPERS else one for one in every]
    if not found or not all(isinstance(one, Optimizer) for one in found):
        raise MolsConfigError(
            f"mols_ds.attach: {type(given).__name__} is not a torch optimizer, a list of them, or an object with "
            '".optimizers"'
        )
    return found
