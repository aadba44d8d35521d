"""A scheduler's rates ahead of the run, and a start where they add up to a multiple of the peak."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as schedulers

from mols_ds.core.config import MolsConfig
from mols_ds.core.phases import Schedule, resolve_schedule, summed_rate_step
from mols_ds.errors import MolsConfigError
from mols_ds.optim.rate_curve import rate_curve

KINDS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda t: min(1.0, (t + 1) / 20)),
    "constant": lambda o: schedulers.LambdaLR(o, lambda t: 1.0),
    "sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.01, 1.0, 30), schedulers.CosineAnnealingLR(o, 170)], [30]
    ),
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.3, total_steps=200, cycle_momentum=False),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 10),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.1, 1.0, 12), schedulers.ExponentialLR(o, 0.99)]
    ),
}


def optimizer_of(lr: float | torch.Tensor = 0.3) -> SGD:
    return SGD([{"params": [torch.zeros(1, requires_grad=True)]}], lr=lr, momentum=0.9)


def really(kind: str, steps: int) -> list[float]:
    optimizer, rates = optimizer_of(), []
    scheduler = KINDS[kind](optimizer)
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", KINDS)
def test_the_curve_is_what_the_scheduler_does(kind: str) -> None:
    optimizer = optimizer_of()
    scheduler = KINDS[kind](optimizer)
    before = scheduler.state_dict(), optimizer.param_groups[0]["lr"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates = rate_curve(scheduler, 4.0)
    assert rates is not None
    assert rates == really(kind, len(rates))
    assert sum(rates) >= 4.0 * max(rates)
    assert len(rates) > 2 * rates.index(max(rates))
    assert (scheduler.state_dict(), optimizer.param_groups[0]["lr"]) == before
    step, total = summed_rate_step(4.0, rates, None)
    assert total == pytest.approx(sum(rates[:step]) / max(rates))
    assert sum(rates[: step - 1]) < 4.0 * max(rates) <= sum(rates[:step])


def test_a_rate_that_is_a_tensor_stays_as_it_is() -> None:
    optimizer = optimizer_of(torch.tensor(0.25))
    assert rate_curve(schedulers.StepLR(optimizer, 2, 0.5), 2.0) is not None
    assert float(optimizer.param_groups[0]["lr"]) == 0.25


def test_unknown_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        def step(self) -> None:
            raise RuntimeError

    assert rate_curve(None, 4.0) is None
    assert rate_curve(Odd(optimizer_of()), 4.0) is None
    begun = schedulers.ExponentialLR(optimizer_of(), 0.9)
    begun.last_epoch = 3
    assert rate_curve(begun, 4.0) is None
    monkeypatch.setattr("mols_ds.optim.rate_curve.LONGEST", 1000)
    ends = schedulers.LambdaLR(optimizer_of(), lambda t: min(1.0, (t + 1) / 499))
    assert len(rate_curve(ends, 4.0) or []) == 997
    endless = schedulers.LambdaLR(optimizer_of(), lambda t: (t + 1) / 1000)
    assert rate_curve(endless, 4.0) is None


# ---------------------------------------------------------------------- schedule


def schedule_of(section: dict[str, Any], total: int, warmup: int | None, rates: list[float] | None) -> Schedule:
    return resolve_schedule(MolsConfig.parse(section), total, warmup, lambda summed: rates)


def test_starts_of_the_method() -> None:
    """METHOD: 1 % of 10,000 steps has summed up 5 peak rates, of 200 steps 0.15."""
    for total, share_sum in ((10_000, 5.05), (200, 0.15)):
        warmup = total // 10
        assert sum((i + 1) / warmup for i in range(total // 100)) == pytest.approx(share_sum)
    for total, start in ((10_000, 89), (200, 13)):
        found = schedule_of({"start": {"summed_rate": 4}}, total, total // 10, None)
        assert (found.start, found.ramp_end) == (start, total // 10)
        # start (start + 1) / 2 / warm-up is the sum, and the first one that reaches 4
        assert found.summed_rate == pytest.approx(start * (start + 1) / 2 / (total // 10))
        assert start == math.ceil((math.sqrt(1 + 8 * 4 * (total // 10)) - 1) / 2)


def test_the_rule_for_unknown_rates_is_said() -> None:
    linear = schedule_of({"start": {"summed_rate": 4}}, 10_000, 1000, None)
    assert linear.remarks == (
        '"mols.start": the rates of this scheduler are unknown, so summed_rate counts a linear warm-up of 1000 steps: '
        "step 89",
    )
    flat = schedule_of({"start": {"summed_rate": 4}}, 10_000, None, None)
    assert (flat.start, flat.summed_rate) == (4, 4.0)
    assert "counts every step with the peak rate: step 4" in flat.remarks[0]
    known = schedule_of({"start": {"summed_rate": 2.5}}, 100, None, [0.5, 0.5, 1.0, 1.0, 1.0, 1.0])
    assert (known.start, known.summed_rate, known.remarks) == (4, 3.0, ())


def test_a_ramp_that_would_end_before_the_start_is_moved() -> None:
    found = schedule_of({"start": {"summed_rate": 4}}, 60, 6, [min(1.0, (i + 1) / 6) for i in range(20)])
    assert (found.start, found.ramp_end) == (7, 14)
    assert found.remarks[0].startswith('"mols.ramp_end": step 6 is not after the start, where the summed rate is 4')
    with pytest.raises(MolsConfigError, match="past the last of 5 steps"):
        schedule_of({"start": {"summed_rate": 9}}, 5, None, None)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"summed_rate": 0}, r'"mols.start.summed_rate": Input should be greater than 0 \(got 0\)'),
        ({"summed_rate": "4"}, r'"mols.start.summed_rate"'),
        ({"summed": 4}, r'"mols.start.summed": unknown key; did you mean "summed_rate"\?'),
        ({}, r'"mols.start.summed_rate" is missing'),
    ],
)
def test_mistakes(start: dict[str, Any], message: str) -> None:
    with pytest.raises(MolsConfigError, match=message):
        MolsConfig.parse({"start": start})
