"""Read the length of the run and its warm-up from a learning-rate scheduler, in the scheduler's own steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, PolynomialLR, SequentialLR

Hints = tuple[int | None, int | None]
"""(total steps, warm-up steps); None: unknown."""


def scheduler_hints(scheduler: object) -> Hints:
    """Return (total steps, warm-up steps) of a scheduler; None for what it does not have.

    Known: DeepSpeed's WarmupDecayLR and WarmupCosineLR, WarmupLR (warm-up only); torch's OneCycleLR, PolynomialLR,
    CosineAnnealingLR, LinearLR (a warm-up if it rises), SequentialLR and ChainedScheduler of these; transformers'
    LambdaLR schedules, whose steps are keywords of the lambda: `warmup_stable_decay` has three of them.
    """
    if scheduler is None:
        return None, None
    if isinstance(scheduler, SequentialLR):
        return _in_sequence(scheduler._schedulers, scheduler._milestones)
    if isinstance(scheduler, ChainedScheduler):
        hints = [scheduler_hints(each) for each in scheduler._schedulers]
        totals, warmups = ([hint[i] for hint in hints if hint[i] is not None] for i in (0, 1))
        return max(totals, default=None), max(warmups, default=None)  # type: ignore[type-var]
    if isinstance(scheduler, LinearLR):
        return None, scheduler.total_iters if scheduler.start_factor < scheduler.end_factor else None
    if isinstance(scheduler, PolynomialLR):
        return scheduler.total_iters, None
    total = getattr(scheduler, "total_num_steps", None) or getattr(scheduler, "total_steps", None)
    total = total or getattr(scheduler, "T_max", None)
    warmup = getattr(scheduler, "warmup_num_steps", None)
    for function in getattr(scheduler, "lr_lambdas", None) or []:
        keywords: dict[str, Any] = getattr(function, "keywords", {})
        total = total or keywords.get("num_training_steps") or _warmup_stable_decay(keywords)
        warmup = warmup if warmup is not None else keywords.get("num_warmup_steps")
    return (int(total) if total else None), (int(warmup) if warmup is not None else None)


def _warmup_stable_decay(keywords: dict[str, Any]) -> int | None:
    parts = [keywords.get(f"num_{part}_steps") for part in ("warmup", "stable", "decay")]
    return None if None in parts else sum(int(part) for part in parts if part is not None)


def _in_sequence(schedulers: Sequence[object], milestones: Sequence[int]) -> Hints:
    """The last scheduler starts at the last milestone. The first one is a warm-up if it has nothing else."""
    last, _ = scheduler_hints(schedulers[-1])
    total, warmup = scheduler_hints(schedulers[0])
    rises = warmup is not None and total is None
    return (None if last is None else milestones[-1] + last), (milestones[0] if rises else warmup)
