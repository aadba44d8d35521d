"""How many steps a Megatron run has taken and will take, as its optimizer and its scheduler tell them."""

from __future__ import annotations

from mols_ds.errors import MolsConfigError


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
