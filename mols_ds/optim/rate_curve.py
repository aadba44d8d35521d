"""Run a copy of a learning-rate scheduler ahead, to know its rates before training."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import torch

LONGEST = 100_000
"""Steps. A warm-up that is longer counts as unknown."""


def rate_curve(scheduler: Any, summed: float, increment: int | None = None) -> list[float] | None:
    """Return the rates of the first steps, until their sum is `summed` times the peak rate.

    The peak is the largest rate of the first n steps, where n is at least twice the step of the peak. Copies the
    scheduler, with parameter groups without parameters, and calls `step()` of the copy. Rates of several parameter
    groups are added.

    Args:
        scheduler: a scheduler with an `optimizer` (torch, DeepSpeed, Megatron); before its first step.
        summed: summed rate over peak rate.
        increment: argument of `step()`; None: without an argument.

    Returns:
        One rate for each step, in any unit; None if the scheduler has taken steps, or cannot be copied and stepped.
    """
    optimizer = getattr(scheduler, "optimizer", None)
    groups = getattr(optimizer, "param_groups", None)
    taken = (getattr(scheduler, name, 0) for name in ("last_epoch", "last_batch_iteration", "num_steps"))
    if not groups or any(count > 0 for count in taken):
        return None
    bare = [{**{key: _copied(value) for key, value in group.items()}, "params": []} for group in groups]
    stand_in = SimpleNamespace(param_groups=bare, step=lambda: None, _opt_called=True)
    rates: list[float] = []
    total, peak, peak_at = 0.0, 0.0, 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: the optimizer has not stepped before its scheduler
            ahead = copy.deepcopy(scheduler, {id(optimizer): stand_in})
            while len(rates) <= 2 * peak_at or total < summed * peak or not peak:
                if len(rates) >= LONGEST:
                    return None
                rate = sum(float(group["lr"]) for group in bare)
                if rate > peak:
                    peak, peak_at = rate, len(rates)
                rates.append(rate)
                total += rate
                ahead.step() if increment is None else ahead.step(increment)
    except Exception:  # a class of the user: any error means that its rates are unknown
        return None
    return rates


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
