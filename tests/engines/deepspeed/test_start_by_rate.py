"""`"start": {"summed_rate": ...}` with DeepSpeed's schedulers: where the applied rates add up."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from mols_ds.optim.rate_curve import rate_curve
from tests.engines.deepspeed.engines import LR, config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.state import inner_optimizer
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

SCHEDULERS: dict[str, dict[str, Any]] = {
    "WarmupLR log": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 9}},
    "WarmupLR linear": {
        "type": "WarmupLR",
        "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 9, "warmup_type": "linear"},
    },
    "WarmupDecayLR": {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": 60, "warmup_max_lr": 0.01, "warmup_num_steps": 9, "warmup_type": "linear"},
    },
    "WarmupCosineLR": {"type": "WarmupCosineLR", "params": {"total_num_steps": 60, "warmup_num_steps": 9}},
    "OneCycle": {
        "type": "OneCycle",
        "params": {
            "cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 9, "cycle_momentum": False
        },
    },
    "none": {},
}  # fmt: skip
SUMMED, SAMPLES, TOTAL = 3.0, 4, 60
CASES = Cases(SCHEDULERS, quick=["WarmupLR log", "none"])


def run(kind: str) -> dict[str, Any]:
    """Train until the alphas are set. Returns the rates of all updates before the calibration and the report."""
    section = SCHEDULERS[kind]
    mols = {"start": {"summed_rate": SUMMED}, "ramp_end": 50, "samples": SAMPLES, "total_steps": TOTAL}
    engine = engine_of(config(0, mols, micros=1, **({"scheduler": section} if section else {})))
    unknown = rate_curve(engine.lr_scheduler, SUMMED) is None
    rates: list[float] = []
    iteration = 0
    while not engine.mols.alphas:
        if engine.mols.phase == "waiting":
            rates.append(float(inner_optimizer(engine).param_groups[0]["lr"]))
        iterate(engine, iteration, 1)
        iteration += 1
    found = {"rates": rates, "report": engine.mols.report(), "unknown": unknown}
    found["remarks"] = engine.mols.controller.state.schedule.remarks
    engine.destroy()
    return found


@functools.cache
def results() -> Results:
    return run_cases(run, 1, [(kind,) for kind in CASES.wanted])


@CASES.parametrize("kind")
def test_the_calibration_starts_where_the_rates_add_up(kind: str) -> None:
    found = results()[(kind,)][0]
    rates, report = found["rates"], found["report"]
    assert report["step"] == len(rates)
    if kind == "none":
        assert found["unknown"] and len(rates) == SUMMED
        assert "counts every step with the peak rate: step 3" in found["remarks"][0]
        return
    peak = 0.01 if "WarmupCosineLR" not in kind else LR
    assert sum(rates[:-1]) < SUMMED * peak <= sum(rates) + 1e-12
    assert report["start_summed_rate"] == pytest.approx(sum(rates) / peak)
    assert not found["unknown"] and not found["remarks"]
