"""MoLS in an Accelerate loop, over DeepSpeed or plain torch.

model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
mols = attach(model, SECTION, total_steps=1000)      # before accelerator.load_state; with DeepSpeed
mols = attach(model, SECTION, total_steps=1000, accelerator=accelerator, optimizer=optimizer)     # without
...
accelerator.log(log_values(mols), step=step)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from mols_ds.core.config import MolsConfig
from mols_ds.core.handle import Handle
from mols_ds.core.protocols import window_of_others_schedule
from mols_ds.core.replaced_methods import ReplacedMethods
from mols_ds.core.session import Session
from mols_ds.engines.deepspeed.api import attach_to, check_is_engine
from mols_ds.engines.torch import api as torch_api
from mols_ds.engines.torch.engine import TorchMols
from mols_ds.errors import MolsConfigError
from mols_ds.integrations.client import fill_section, load_state, log_values, resolve_section, save_state
from mols_ds.optim.scheduler_hints import scheduler_hints

__all__ = ["attach", "log_values"]

WHO = "mols_ds.integrations.accelerate.attach"


def attach(
    engine_or_optimizer: Any,
    section: Mapping[str, Any] | None = None,
    *,
    total_steps: int | None = None,
    scheduler: Any = None,
    optimizer: Any = None,
    accelerator: Accelerator | None = None,
) -> Handle:
    """Attach MoLS to what `accelerator.prepare` returned. Collective; call it before `accelerator.load_state`.

    In a step that mode "probe" discards, `accelerator.optimizer_step_was_skipped` is true, so a prepared scheduler does
    not advance. If `mols_ds.patch()` has attached MoLS already, returns that handle.

    Args:
        engine_or_optimizer: the model that `prepare` returned.
        section: a "mols" section; None: that of the DeepSpeed config.
        total_steps: updates of the whole run, for shares; None: from `scheduler`.
        scheduler: the scheduler that `prepare` returned. Accelerate steps it once per process and update.
        optimizer: the optimizer that `prepare` returned, or a list of them. With DeepSpeed needed at ZeRO stage 0 in
            fp32 only, where no other object can report a skipped step.
        accelerator: needed without DeepSpeed.

    Returns:
        The handle.

    Raises:
        MolsConfigError: no engine, no section, two different ones, a wrong one, or an argument is missing.
        MolsUnsupportedError: as `mols_ds.attach`.
    """
    engine = engine_or_optimizer
    if isinstance(engine, AcceleratedOptimizer | torch.optim.Optimizer):
        raise MolsConfigError("attach: an optimizer does not know its engine; pass the model that prepare() returned")
    total, warmup = _lengths(scheduler)
    total = total if total_steps is None else total_steps
    if accelerator is not None and accelerator.distributed_type != DistributedType.DEEPSPEED:
        filled = fill_section(resolve_section(section, None, WHO), total, warmup)
        mols = attach_optimizer(accelerator, engine, optimizer, filled, _announce)
        _follow_checkpoints(accelerator, mols)
        return mols
    if isinstance(engine, torch.nn.Module) and AcceleratorState().distributed_type != DistributedType.DEEPSPEED:
        raise MolsConfigError(f"{WHO}: without DeepSpeed it needs accelerator=accelerator and optimizer=optimizer too")
    check_is_engine(engine)
    if isinstance(optimizer, AcceleratedOptimizer):
        _add_overflow(optimizer)
    if isinstance(getattr(engine, "mols", None), Session):
        return engine.mols  # type: ignore[no-any-return]
    found = resolve_section(section, engine.config, WHO)
    return attach_to(engine, fill_section(found, total, warmup), "client")


def attach_optimizer(
    accelerator: Accelerator, model: Any, optimizer: Any, section: MolsConfig, announce: Callable[[int], str]
) -> Handle:
    """Attach MoLS to torch optimizers that Accelerate prepared, without DeepSpeed. Reads gradients before
    `accelerator.clip_grad_norm_` and `clip_grad_value_`. The Trainer of transformers uses it too."""
    optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    if not optimizers or not all(isinstance(one, AcceleratedOptimizer) for one in optimizers):
        raise MolsConfigError(f"{WHO}: optimizer={type(optimizer).__name__} is not what accelerator.prepare returned")
    mols = torch_api.attach(optimizers, model, section, None, accelerator.scaler, announce)
    if isinstance(mols, TorchMols):
        for one in optimizers:
            if one.scaler is not None:
                one.__setstate__({})  # it keeps the optimizer's `step`: make it keep ours
            _report_discarded(one, mols)
        for name in ("clip_grad_norm_", "clip_grad_value_"):
            _read_before(accelerator, name, mols)
    return mols


def _report_discarded(optimizer: AcceleratedOptimizer, mols: TorchMols) -> None:
    """Make a discarded step one that `accelerator.optimizer_step_was_skipped` reports."""

    def step(*args: Any, **kwargs: Any) -> None:
        stock(*args, **kwargs)
        if optimizer.gradient_state.sync_gradients and (mols.discarded or optimizer.scaler is None):
            optimizer._is_overflow = mols.discarded

    stock = ReplacedMethods(optimizer).set("step", step)


def _read_before(accelerator: Accelerator, name: str, mols: Handle) -> None:
    def clip(*args: Any, **kwargs: Any) -> Any:
        if accelerator.sync_gradients:
            mols.read_gradients()
        return stock(*args, **kwargs)

    stock = ReplacedMethods(accelerator).set(name, clip)


def _follow_checkpoints(accelerator: Accelerator, mols: Handle) -> None:
    """Save the state in `accelerator.save_state`, and load it after `accelerator.load_state`."""
    folder = ""

    def load(*args: Any, **kwargs: Any) -> None:
        stock(*args, **kwargs)
        load_state(mols, folder)

    def remember(models: Any, loaded: str) -> None:
        nonlocal folder
        folder = loaded

    accelerator.register_save_state_pre_hook(lambda models, weights, saved: save_state(mols, saved))
    accelerator.register_load_state_pre_hook(remember)
    stock = ReplacedMethods(accelerator).set("load_state", load)


def _announce(samples: int) -> str:
    return window_of_others_schedule(
        samples,
        "a schedule that waits for optimizer_step_was_skipped (a prepared one) does not advance, another one advances "
        f"by {samples} steps meanwhile",
    )


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
