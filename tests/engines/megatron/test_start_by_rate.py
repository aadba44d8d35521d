"""`"start": {"summed_rate": ...}` with Megatron's OptimizerParamScheduler, which counts samples."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.engines.megatron import building
from tests.engines.megatron.grids import tiny
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

SUMMED, SAMPLES, WARMUP, UPDATES = 3.0, 4, 8, 60
STYLES = Cases(("linear", "cosine", "inverse-square-root"), quick=["linear"])


def run(style: str) -> dict[str, Any]:
    """Train until the alphas are set. Returns the rates of all updates before the calibration and the report."""
    from megatron_patches.cpu.emulation import cpu_megatron

    with cpu_megatron():
        building.start(tiny())
        built = building.build(tiny())
        chain, scheduler = building.optimizer(built, iterations=UPDATES, warmup=WARMUP, style=style)
        section = {"start": {"summed_rate": SUMMED}, "samples": SAMPLES, "ramp_end": 50}
        mols = building.attach(built, chain, scheduler, section)
        rates: list[float] = []
        iteration = 0
        while not mols.alphas:
            if mols.phase == "waiting":
                rates.append(float(chain.param_groups[0]["lr"]))
            building.step(built, chain, scheduler, iteration)
            iteration += 1
        return {"rates": rates, "report": mols.report(), "remarks": mols.controller.state.schedule.remarks}


@functools.cache
def results() -> Results:
    return run_cases(run, 1, [(style,) for style in STYLES.wanted])


@STYLES.parametrize("style")
def test_the_calibration_starts_where_the_rates_add_up(style: str) -> None:
    found = results()[(style,)][0]
    rates, peak = found["rates"], tiny().lr
    assert found["report"]["step"] == len(rates)
    assert sum(rates[:-1]) < SUMMED * peak <= sum(rates) + 1e-12
    assert found["report"]["start_summed_rate"] == pytest.approx(sum(rates) / peak)
    assert not found["remarks"]
