"""A loss that is a power of two smaller or larger has the same alphas, though fp32 has no squares of its gradients."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.engines.deepspeed.engines import config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.models import PlainLM
from tests.helpers.harness import Results, run_cases

pytestmark = [pytest.mark.distributed, pytest.mark.tier("all")]

WORLD, SAMPLES, STAGES, POWERS = 2, 8, (0, 1, 2, 3), (0, -75, 62)


def alphas(stage: int, power: int) -> dict[str, Any]:
    """The report's groups after a probe window."""
    section = {"start": 0, "ramp_end": 40, "samples": SAMPLES, "noise_floor_correction": False, "alpha_max": None}
    torch.manual_seed(0)
    model = PlainLM()
    settings = config(stage, section, micros=1, gradient_clipping=0.0)
    engine = engine_of(settings, model, torch.optim.SGD(list(model.parameters()), lr=0.0))
    for iteration in range(SAMPLES):
        iterate(engine, iteration, 1, spoil=lambda loss: loss * 2.0**power)
    report = engine.mols.report()
    engine.destroy()
    assert "failed" not in report
    return dict(report["groups"])


@functools.cache
def runs() -> Results:
    return run_cases(alphas, WORLD, [(stage, power) for stage in STAGES for power in POWERS], timeout=120)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("power", POWERS[1:])
def test_the_unit_of_the_loss_does_not_matter(stage: int, power: int) -> None:
    for plain, other in zip(runs()[stage, 0], runs()[stage, power], strict=True):
        assert len({row["alpha"] for row in plain.values()}) > 2
        for group, row in plain.items():
            assert other[group]["alpha"] == pytest.approx(row["alpha"], rel=1e-6), group
            assert other[group]["snr"] == pytest.approx(row["snr"], rel=1e-6), group
            assert other[group]["constant_share"] == row["constant_share"]
