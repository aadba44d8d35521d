"""Detect checkpoints with MoLS state that an engine loaded before MoLS was attached.

DeepSpeed keeps nothing of a checkpoint but the restored state. So its `load_checkpoint` is wrapped at the first use of
`mols_ds.initialize`, `attach` or `patch`; the wrapper only reads the results.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import deepspeed

from mols_ds.core.phases import Schedule
from mols_ds.engines.deepspeed.compat import Engine, load_options
from mols_ds.errors import MolsCheckpointError

KEY = "mols"
"""Key of the MoLS state in a checkpoint's client_state."""
_held: WeakKeyDictionary[Engine, bool] = WeakKeyDictionary()
"""Engine -> whether its last loaded checkpoint had MoLS state that was not used."""


def watch_loads() -> None:
    """Wrap `load_checkpoint` to see what engines load. A second call does nothing."""
    stock = deepspeed.DeepSpeedEngine.load_checkpoint
    if hasattr(stock, "watched_by_mols"):
        return

    @functools.wraps(stock)
    def load_checkpoint(engine: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(engine, *args, **kwargs)
        state = result[1] if isinstance(result, tuple) and len(result) == 2 else None
        alone = load_options(*args, **kwargs)["load_module_only"]
        _held[engine] = isinstance(state, Mapping) and KEY in state and not alone
        return result

    load_checkpoint.watched_by_mols = True  # type: ignore[attr-defined]
    deepspeed.DeepSpeedEngine.load_checkpoint = load_checkpoint


def mark_loaded(engine: Engine) -> None:
    """Record that MoLS was attached when the engine loaded its checkpoint."""
    _held[engine] = False


def check_order(engine: Engine, schedule: Schedule, measures: bool) -> str | None:
    """Return a warning if MoLS is attached after the run has started, or None.

    Args:
        engine: the engine at attach.
        schedule: of this run.
        measures: alphas are measured; given alphas are never lost.

    Raises:
        MolsCheckpointError: the engine loaded a checkpoint with MoLS state, or one that nobody saw: the run would
            replace its alphas by a new calibration.
    """
    t = int(engine.global_steps)
    if not measures or t == 0 or t < schedule.start:
        return None
    order = (
        "attach MoLS before engine.load_checkpoint, which then loads its state if there is one "
        "(Trainer: MolsCallback().bind(trainer); Accelerate: after prepare, before load_state)"
    )
    held = _held.get(engine, None if engine.loaded_checkpoint_dp_world_size is not None else False)
    if held:
        raise MolsCheckpointError(f"this engine loaded a checkpoint with MoLS state before MoLS was attached: {order}")
    if held is None:
        raise MolsCheckpointError(
            f"this engine loaded a checkpoint before MoLS could check whether it has MoLS state: {order}"
        )
    if t == schedule.start:
        return None
    return f"MoLS is attached at step {t}, past mols.start (step {schedule.start}). In a resumed run, {order}"


watch_loads()
