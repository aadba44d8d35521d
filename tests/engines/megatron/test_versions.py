"""The newest megatron-core gives the alphas of the installed one, trains, and saves and loads MoLS's state."""

from __future__ import annotations

import functools
import os
from importlib import metadata
from typing import Any

import pytest
import torch

from megatron_patches.cpu.emulation import cpu_megatron
from tests.engines.megatron import test_rates
from tests.engines.megatron.building import Setup, newest
from tests.engines.megatron.running import SECTION, Run
from tests.helpers.digests import differing
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

WORLD = 2
TOLERANCE = 1e-5  # fp32: kernels of another release may add in another order
GRIDS = {
    "TP2": Setup(tp=2),
    "PP2 tied": Setup(pp=2, tied=True),
    "EP2": Setup(experts=4, ep=2),
    "DP2": Setup(),
    "DP2 plain": Setup(distributed=False),
    "rates as tensors": Setup(),
}
MUP = "muP"  # 0.17 and later
NAMES = Cases([*GRIDS, MUP], full=["PP2 tied", "DP2", "DP2 plain"])


def grid(name: str) -> dict[str, Any]:
    """Calibrate, ramp, save, resume, continue. `name` of `GRIDS`, or `MUP` for the applied rates under it."""
    if name == MUP:
        return test_rates.watched(Setup(tp=2), test_rates.PROBE, "cosine", "mup", {})
    setup, section = GRIDS[name], {**SECTION, "mode": "online" if name == "DP2" else "probe"}
    with cpu_megatron(fused_adam=setup.distributed):
        import megatron.core as core

        with Run(setup, section) as run:
            if name == "rates as tensors":  # 0.17 and later may keep them so
                for group in run.optimizer.param_groups:
                    group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float64)
            run.train(0, 10)
            phase, rates = run.mols.phase, run.mols.multipliers
            run.save(name, "fully_reshardable")
            saved = run.fingerprint()
            run.train(10, 12)
            went_on = run.fingerprint()
            report = run.mols.report()
            finite = all(bool(p.isfinite().all()) for chunk in run.built.chunks for p in chunk.parameters())
        with Run(setup, section) as run:
            warned = run.load(name, "fully_reshardable")
            loaded = [key for key in differing(saved, run.fingerprint()) if not key.startswith("group")]
            run.train(10, 12)
            resumed = [key for key in differing(went_on, run.fingerprint()) if not key.startswith("group")]
        return {
            "version": core.__version__,
            "phase": phase,
            "multipliers": rates,
            "snr": {group: row["snr"] for group, row in report["groups"].items()},
            "alphas": {group: row["alpha"] for group, row in report["groups"].items()},
            "finite": finite,
            "warned": warned,
            "loaded": loaded,
            "resumed": resumed,
        }


@functools.cache
def installed() -> Results:
    return run_cases(grid, WORLD, [(name,) for name in NAMES.wanted if name in GRIDS], timeout=90)


@functools.cache
def of_the_newest() -> Results:
    folder = newest()
    assert folder is not None
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return run_cases(grid, WORLD, [(name,) for name in NAMES.wanted], timeout=90, environment={"PYTHONPATH": path})


@pytest.mark.skipif(newest() is None, reason="no newest megatron-core beside the installed one: make setup-dev")
@NAMES.parametrize("name", GRIDS)
def test_the_newest_release_gives_the_alphas_of_the_installed_one(name: str) -> None:
    for old, new in zip(installed()[name,], of_the_newest()[name,], strict=True):
        assert old["version"].split("+")[0] == metadata.version("megatron-core") != new["version"]
        for found in (old, new):
            assert found["finite"] and found["warned"] == [] and found["loaded"] == [] and found["resumed"] == []
            assert found["phase"] == ("fixed" if name == "DP2" else "ramping")
            assert len(set(found["alphas"].values())) > 2
        for key in ("snr", "alphas", "multipliers"):
            assert new[key] == pytest.approx(old[key], rel=TOLERANCE), key


@pytest.mark.skipif(newest() is None, reason="no newest megatron-core beside the installed one: make setup-dev")
@NAMES.reads(MUP)
def test_the_multiplier_sits_on_top_of_mup() -> None:
    ranks = of_the_newest()[MUP,]
    for found in ranks:
        assert any(len(row["said"]) > 1 for row in found["rows"]), "muP gives matrices another rate"
    test_rates.check(ranks, test_rates.PROBE)
