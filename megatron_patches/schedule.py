"""Steps taken and planned in a Megatron run, from its optimizer and scheduler."""

from __future__ import annotations

from mols_ds.errors import MolsConfigError


def optimizer_steps(optimizer: object) -> int:
    """Return the number of updates of this rank's inner optimizers, from Adam's counters; 0 without a counter."""
    counts = [0]
    for outer in getattr(optimizer, "chained_optimizers", []):
        if getattr(outer, "is_stub_optimizer", False):
            continue
        counts += [int(group["step"]) for group in outer.optimizer.param_groups if group.get("step") is not None]
        counts += [int(state["step"]) for state in outer.optimizer.state.values() if state.get("step") is not None]
    return max(counts)


def scheduler_hints(scheduler: object, samples_per_step: int | None) -> tuple[int | None, int | None]:
    """Return (total steps, warm-up steps) of a scheduler; None for an unknown number.

    The scheduler counts the increments of `scheduler.step(increment)`: samples in Megatron-LM and Megatron-Bridge.

    Args:
        scheduler: an OptimizerParamScheduler, or None.
        samples_per_step: this increment. None: the constant global batch size of Megatron's
            num_microbatches_calculator. Without either both numbers are None, and a share such as "start": 0.01 needs
            "mols.total_steps".

    Raises:
        MolsConfigError: samples_per_step is below 1.
    """
    if samples_per_step is not None and samples_per_step < 1:
        raise MolsConfigError(
            f"samples_per_step is {samples_per_step}; it is the increment of scheduler.step(), at least 1"
        )
    decay, warmup = getattr(scheduler, "lr_decay_steps", None), getattr(scheduler, "lr_warmup_steps", None)
    per = increment_of(samples_per_step)
    if decay is None or per is None:
        return None, None
    return round(decay / per), None if warmup is None else round(warmup / per)


def increment_of(samples_per_step: int | None) -> int | None:
    """Return the argument of each `scheduler.step()`; None if unknown."""
    if samples_per_step:
        return samples_per_step
    from megatron.core import num_microbatches_calculator as calculator

    current = getattr(calculator, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR", None)
    if type(current).__name__ != "ConstantNumMicroBatchesCalculator":
        return None  # not set, or a growing batch size
    return int(calculator.get_current_global_batch_size())
