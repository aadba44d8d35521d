"""MoLS in an Accelerate loop over DeepSpeed.

model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
mols = attach(model, SECTION, total_steps=1000)      # before accelerator.load_state
...
accelerator.log(log_values(mols), step=step)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState

from mols_ds.core.handle import Handle
from mols_ds.core.session import Session
from mols_ds.engines.deepspeed.api import attach_to, check_is_engine
from mols_ds.errors import MolsConfigError
from mols_ds.integrations.client import fill_section, log_values, resolve_section
from mols_ds.optim.scheduler_hints import scheduler_hints

__all__ = ["attach", "log_values"]


def attach(
    engine_or_optimizer: Any,
    section: Mapping[str, Any] | None = None,
    *,
    total_steps: int | None = None,
    scheduler: Any = None,
    optimizer: Any = None,
) -> Handle:
    """Attach MoLS to the engine that `accelerator.prepare` returned. Collective; call it before
    `accelerator.load_state`.

    In a step that mode "probe" discards, `accelerator.optimizer_step_was_skipped` is true, so a prepared scheduler does
    not advance. If `mols_ds.patch()` has attached MoLS already, returns that handle.

    Args:
        engine_or_optimizer: the model that `prepare` returned (DeepSpeed's engine).
        section: a "mols" section; None: that of the DeepSpeed config.
        total_steps: updates of the whole run, for shares; None: from `scheduler`.
        scheduler: the scheduler that `prepare` returned. Accelerate steps it once per process and update.
        optimizer: the optimizer that `prepare` returned. Needed at ZeRO stage 0 in fp32, where no other object can
            report a skipped step.

    Returns:
        `engine.mols`.

    Raises:
        MolsConfigError: no engine, no section, two different ones, or a wrong one.
        MolsUnsupportedError: as `mols_ds.attach`.
    """
    engine = engine_or_optimizer
    if isinstance(engine, AcceleratedOptimizer | torch.optim.Optimizer):
        raise MolsConfigError("attach: an optimizer does not know its engine; pass the model that prepare() returned")
    check_is_engine(engine)
    if isinstance(optimizer, AcceleratedOptimizer):
        _add_overflow(optimizer)
    if isinstance(getattr(engine, "mols", None), Session):
        return engine.mols  # type: ignore[no-any-return]
    found = resolve_section(section, engine.config, "mols_ds.integrations.accelerate.attach")
    total, warmup = _lengths(scheduler)
    return attach_to(engine, fill_section(found, total_steps or total, warmup), "client")


def _add_overflow(optimizer: AcceleratedOptimizer) -> None:
    """Add the attribute `overflow` to a torch optimizer: Accelerate reads it on the ZeRO optimizer."""
    inner = optimizer.optimizer
    if isinstance(inner, torch.optim.Optimizer) and not hasattr(inner, "overflow"):
        inner.overflow = False  # type: ignore[attr-defined]
        optimizer.__has_overflow__ = True


def _lengths(scheduler: Any) -> tuple[int | None, int | None]:
    """Return (total, warm-up) in updates of the run."""
    total, warmup = scheduler_hints(getattr(scheduler, "scheduler", scheduler))
    linked = getattr(scheduler, "step_with_optimizer", False) and not getattr(scheduler, "split_batches", False)
    times = int(AcceleratorState().num_processes) if linked else 1
    return (total // times if total else None), (None if warmup is None else warmup // times)
