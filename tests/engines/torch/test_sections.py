"""`weight_decay`, `fixed_alphas` and `recalibrate` on plain torch have the effect that the reference writes out."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mols_ds
from tests.engines.torch.calibration_run import SETTINGS, adamw, clipped
from tests.engines.torch.parallel import DATA, MICROS, backward, full_weights, tiny, wrapped
from tests.helpers.harness import Results, run_cases
from tests.helpers.oracle.adamw import ElementwiseAdamW, ramp
from tests.helpers.oracle.models import masks
from tests.helpers.oracle.reports import check_rows
from tests.helpers.oracle.sizes import VOCABULARY
from tests.helpers.oracle.statistics import GroupValues, alphas, gradient_sample, group_values, tokens_of
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

MODEL = "gpt2"  # whose fused columns go by delta
START, SAMPLES, RAMP_END, UPDATES, EVERY = 1, 4, 6, 20, 6
AGAIN = START + SAMPLES + EVERY  # first step of the second calibration
FIXED = {"embedding": 0.5, "qk": 2.0, "vo": 1.5, "mlp": 3.0}
DECAY = 2.0  # 4 % of a weight over the run at the base rate, 12 % at the mlp's
RTOL, ATOL = 1e-5, 1e-5  # as in test_statistics.py
DIFFERENCE = 1e-3  # of the two kinds of decay
SECTIONS: dict[str, dict[str, Any]] = {
    "scaled": {"fixed_alphas": FIXED, "weight_decay": "scaled"},
    "unscaled": {"fixed_alphas": FIXED, "weight_decay": "unscaled"},
    "recalibrate": {"recalibrate": {"every": EVERY}, "mode": "online", "samples": SAMPLES, "estimator": "damping"},
}
SECTIONS["recalibrate"] |= {"reference": "vo", "alpha_min": 0.1, "alpha_max": 10.0}
CASES = Cases(
    [(how, name) for how in ("fsdp2", "ddp") for name in SECTIONS],
    quick=[("fsdp2", "unscaled"), ("fsdp2", "recalibrate")],
)


def train(how: str, name: str) -> dict[str, Any]:
    """On each rank: before each step the phase, after it the multipliers and the alphas; reports; the last weights."""
    torch.manual_seed(0)
    model = tiny(MODEL)
    run = wrapped(how, model)
    optimizer = adamw(model, _adam(name))
    section = {"start": START, "ramp_end": RAMP_END, **SECTIONS[name]}
    mols = mols_ds.attach(optimizer, run, section, total_steps=UPDATES)
    phases, applied, reports = [], [], []
    for iteration in range(UPDATES):
        phases.append(mols.phase)
        backward(how, run, iteration)
        mols.read_gradients()
        clipped(run)
        optimizer.step()
        optimizer.zero_grad()
        applied.append(mols.multipliers)
        if mols.report() and (not reports or mols.report() != reports[-1]):
            reports.append(mols.report())
    decays = sorted({group["weight_decay"] for group in optimizer.param_groups})
    return {"phases": phases, "applied": applied, "reports": reports, "weights": full_weights(model), "decays": decays}


def _adam(name: str) -> Any:
    return replace(SETTINGS, weight_decay=DECAY, scaled_decay=name != "unscaled")


@functools.cache
def results() -> Results:
    return run_cases(train, 2, CASES.wanted, timeout=60)


def reference(
    how: str, name: str, applied: list[dict[str, float]]
) -> tuple[list[dict[str, GroupValues]], dict[str, Tensor]]:
    """The values of each calibration of "recalibrate", and the weights after updates with these multipliers."""
    model = tiny(MODEL)
    mask = masks(MODEL, model)
    optimizer, samples = ElementwiseAdamW(model, mask, _adam(name)), []
    for t, factors in enumerate(applied):
        samples.append(gradient_sample(model, t, DATA[how], MICROS))
        optimizer.step(samples[-1], 1.0, factors)
        assert optimizer.norm > _adam(name).clip, "clipping must act"
    windows = [range(first, first + SAMPLES) for first in (START, AGAIN)]
    values = [
        group_values([samples[t] for t in window], mask, tokens_of(window, DATA[how], MICROS, VOCABULARY))
        for window in windows
    ]
    return values, {key: p.detach() for key, p in model.named_parameters()}


def check_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    errors = {key: float((found[key] - w).abs().max()) for key, w in expected.items()}
    assert max(errors.values()) <= ATOL, max(errors.items(), key=lambda item: item[1])


@CASES.parametrize(("how", "name"), [case for case in CASES if case[1] != "recalibrate"])
def test_fixed_alphas_and_the_decay_they_scale(how: str, name: str) -> None:
    every = {**FIXED, "other": 1.0}
    expected = [{g: 1 + (a - 1) * ramp(t, START, RAMP_END, "linear") for g, a in every.items()} for t in range(UPDATES)]
    _, weights = reference(how, name, expected)
    _, other = reference(how, "scaled" if name == "unscaled" else "unscaled", expected)
    for rank in results()[how, name]:
        assert "calibrating" not in rank["phases"]
        assert [report["mode"] for report in rank["reports"]] == ["fixed"]
        assert rank["reports"][0]["weight_decay"] == name
        for t, factors in enumerate(expected):
            assert rank["applied"][t] == pytest.approx(factors, rel=1e-12), t
        check_weights(rank["weights"], weights)
        wrong = max(float((rank["weights"][key] - w).abs().max()) for key, w in other.items())
        assert wrong > DIFFERENCE, "the two kinds of decay differ far beyond the tolerance"
        assert rank["decays"] == [0.0, DECAY], "the user's own decay is in the groups"


@CASES.parametrize(("how", "name"), [case for case in CASES if case[1] == "recalibrate"])
def test_a_second_calibration_measures_anew_and_its_ramp_begins_at_the_first_alphas(how: str, name: str) -> None:
    ranks = results()[how, name]
    phases = ["waiting", *["calibrating"] * 4, "ramping", *["fixed"] * 5, *["calibrating"] * 4, *["ramping"] * 5]
    reports = ranks[0]["reports"]
    assert len(reports) == 2
    first, second = ({g: row["alpha"] for g, row in report["groups"].items()} for report in reports)
    assert all(abs(second[group] / first[group] - 1) > 1e-3 for group in ("qk", "mlp", "embedding"))
    ended = AGAIN + SAMPLES
    expected = [
        {
            group: 1 + (alpha - 1) * ramp(t, START + SAMPLES, RAMP_END, "linear")
            if t < ended
            else alpha + (second[group] - alpha) * ramp(t, ended, ended + RAMP_END - START, "linear")
            for group, alpha in first.items()
        }
        for t in range(UPDATES)
    ]
    values, weights = reference(how, name, expected)
    for report, truth in zip(reports, values, strict=True):
        check_rows(report["groups"], truth, "damping", RTOL)
        snr = {group: row["snr"] for group, row in report["groups"].items()}
        wanted = alphas(snr, "vo", steps=True, low=0.1, high=10.0)
        assert {group: row["alpha"] for group, row in report["groups"].items()} == pytest.approx(wanted, rel=RTOL)
    for rank in ranks:
        assert rank["phases"] == phases and rank["reports"] == reports
        for t, factors in enumerate(expected):
            assert rank["applied"][t] == pytest.approx(factors, rel=1e-12), t
        check_weights(rank["weights"], weights)
