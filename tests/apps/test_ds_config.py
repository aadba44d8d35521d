"""Settings whose effect no other file asserts on a real engine: layer_type groups, a ramp end read off a scheduler."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines.deepspeed.engines import config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.helpers.harness import run_cases

WARMUP = 7


def layered() -> dict[str, Any]:
    """Stage 2, one multiplier a layer, ramp end from DeepSpeed's WarmupCosineLR."""
    section = {"start": 1, "samples": 8, "mode": "online", "ramp_end": "auto", "granularity": "layer_type"}
    section |= {"estimator": "damping", "noise_floor_correction": False, "start": 0, "samples": 4}
    warmup = {"type": "WarmupCosineLR", "params": {"total_num_steps": 40, "warmup_num_steps": WARMUP}}
    engine = engine_of(config(2, mols=section, micros=1, scheduler=warmup))
    phases = []
    for step in range(9):
        phases.append(engine.mols.phase)
        iterate(engine, step, 1)
    mols = engine.mols
    seen = {"phases": phases, "alphas": mols.alphas, "multipliers": mols.multipliers, "lrs": mols.applied_lrs}
    seen["ramp_end"] = engine.mols.controller.state.schedule.ramp_end
    engine.destroy()
    return seen


@pytest.mark.distributed
@pytest.mark.tier("all")
def test_layer_type_and_ramp_end_auto_reach_the_engine() -> None:
    for seen in run_cases(layered, 2, [()])[()]:
        assert seen["ramp_end"] == WARMUP
        assert seen["phases"] == ["calibrating"] * 4 + ["ramping"] * 3 + ["fixed"] * 2
        layers = {group for group in seen["alphas"] if group.startswith("qk.")}
        assert len(layers) == 2 and "qk" not in seen["alphas"]
        assert len({seen["alphas"][group] for group in layers}) == 2, "each layer has a multiplier of its own"
        assert seen["multipliers"] == seen["alphas"]
        # the matrices share one parameter group, so one base rate
        bases = [seen["lrs"][group] / seen["alphas"][group] for group in sorted(layers)]
        assert bases[0] == pytest.approx(bases[1], rel=1e-12) and bases[0] > 0
