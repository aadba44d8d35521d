"""What MoLS has to know of a Megatron set-up before it attaches, and what it refuses, by name and with the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from megatron_patches import precision
from mols_ds.core.config import MolsConfig
from mols_ds.errors import MolsConfigError, MolsUnsupportedError

TESTED = ((0, 15), (0, 19))
"""First and last megatron-core release (major, minor): 0.15.3, 0.16.1, 0.17.1, 0.18.0 and 0.19.2 were run with
tests/engines/megatron/test_versions.py; CI runs 0.16 and the last."""
NEEDED = ("prepare_grads", "step_with_ready_grads", "get_grad_norm", "sharded_state_dict", "load_state_dict", "step")


def check_version(force: bool) -> None:
    """Raise `MolsUnsupportedError` for a missing or an untested megatron-core; `force` lets an untested one pass."""
    try:
        import megatron.core as core
    except ImportError as error:
        raise MolsUnsupportedError(f"megatron-core cannot be imported ({error}): pip install megatron-core") from None
    version = str(core.__version__)
    number = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if force or TESTED[0] <= number <= TESTED[1]:
        return
    low, high = (".".join(map(str, bound)) for bound in TESTED)
    raise MolsUnsupportedError(
        f"megatron-core {version} has not been tested with MoLS (tested: {low} to {high}): install one, or pass "
        "force=True and compare a short run with MoLS off"
    )


def check_supported(optimizer: Any, model_config: Any, config: MolsConfig, *, fused: bool) -> None:
    """Raise `MolsUnsupportedError` for what would silently train wrong. `fused`: some parameter has several groups."""
    missing = [name for name in NEEDED if not hasattr(optimizer, name)]
    if missing:
        raise MolsUnsupportedError(
            f"{type(optimizer).__name__} has no {', '.join(missing)} any more: install a tested megatron-core"
        )
    precision.check(model_config, getattr(optimizer, "config", None))
    for applies, what, way_out in precision.optimizer_refusals(optimizer, config.mode, fused=fused):
        if applies:
            raise MolsUnsupportedError(f"MoLS does not support {what}: {way_out}")


def find_config(model_chunks: Sequence[nn.Module]) -> Any:
    """The TransformerConfig of the chunks. Raises `MolsConfigError` where there is none."""
    if not model_chunks:
        raise MolsConfigError("no model chunk was given: pass the list of modules that the optimizer was built from")
    for module in model_chunks[0].modules():
        config = getattr(module, "config", None)
        if hasattr(config, "num_attention_heads") or hasattr(config, "hidden_size"):
            return config
    raise MolsConfigError(
        f"{type(model_chunks[0]).__name__} has no TransformerConfig as `.config`, which fused layouts are read from"
    )


def optimizer_steps(optimizer: object) -> int:
    """Updates that the inner optimizers of this rank have taken, from Adam's own counters; 0 where there is none."""
    counts = [0]
    for outer in getattr(optimizer, "chained_optimizers", []):
        if getattr(outer, "is_stub_optimizer", False):
            continue
        counts += [int(group["step"]) for group in outer.optimizer.param_groups if group.get("step") is not None]
        counts += [int(state["step"]) for state in outer.optimizer.state.values() if state.get("step") is not None]
    return max(counts)


def scheduler_hints(scheduler: object, samples_per_step: int | None) -> tuple[int | None, int | None]:
    """(total steps, warm-up steps) from an OptimizerParamScheduler, or None each.

    It counts what the training loop passes to `scheduler.step(increment)`, in Megatron-LM and Megatron-Bridge samples.
    samples_per_step: that increment; None: the constant global batch size of Megatron's num_microbatches_calculator,
    if one is set. Without either nothing is assumed, and a share needs "mols.total_steps".
    """
    if samples_per_step is not None and samples_per_step < 1:
        raise MolsConfigError(
            f"samples_per_step is {samples_per_step}; it is what scheduler.step() is given, at least 1"
        )
    decay, warmup = getattr(scheduler, "lr_decay_steps", None), getattr(scheduler, "lr_warmup_steps", None)
    per = samples_per_step or _global_batch_size()
    if decay is None or per is None:
        return None, None
    return round(decay / per), None if warmup is None else round(warmup / per)


def _global_batch_size() -> int | None:
    from megatron.core import num_microbatches_calculator as calculator

    current = getattr(calculator, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR", None)
    if type(current).__name__ != "ConstantNumMicroBatchesCalculator":
        return None  # none set, or a batch size that grows
    return int(calculator.get_current_global_batch_size())
