"""Probe windows that leave no trace, and fp16 with a loss scale that overflows in the window."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.engines.megatron import building
from tests.engines.megatron.building import Setup
from tests.engines.megatron.grids import Plan, tiny
from tests.engines.megatron.state import everything, random_state
from tests.helpers.digests import digest
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

WORLD = 2
PROBE = Plan(start=2, samples=4, ramp_end=4, updates=6, warmup=2)
NO_EFFECT = {"alpha_min": 1.0, "alpha_max": 1.0}  # so that the updates behind the window are those of stock Megatron
DROPOUT = 0.1
DROPPED: dict[str, Setup] = {
    "tp2": tiny(tp=2),
    "tp2 sp bf16, recomputed": tiny(tp=2, sp=True, dtype="bfloat16", recompute="full"),
    "pp2 tied": tiny(pp=2, tied=True),
}
WAYS = ("stock", "probed", "forgetful")
GRIDS = Cases(DROPPED, quick=["tp2"])
FORGETFUL = Cases(["tp2"])

OVERFLOWING = 2.0**20  # the first samples overflow
HALF_SAMPLES = 8
HALF_RTOL = 1e-3  # a larger loss scale keeps more bits of the gradients that are subnormal in fp16
SCALED: dict[str, Setup] = {
    "dp2 plain": tiny(dtype="float16", distributed=False),
    "tp2": tiny(dtype="float16", tp=2),
}
OVERFLOWED = Cases(SCALED)


# --- dropout --------------------------------------------------------------------------------------------------------


def _turn_on_dropout(built: Any) -> None:
    for chunk in built.chunks:
        chunk.train()
        for module in chunk.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = DROPOUT
            if hasattr(module, "hidden_dropout"):
                module.hidden_dropout = DROPOUT


def drop(setup: Setup, way: str) -> dict[str, Any]:
    """On each rank: fingerprints after each update and around the window; "forgetful" keeps the random state."""
    from megatron_patches.cpu.emulation import cpu_megatron

    with cpu_megatron():
        building.start(setup)
        built = building.build(setup)
        _turn_on_dropout(built)
        chain, scheduler = building.optimizer(built, iterations=PROBE.updates, warmup=PROBE.warmup)
        torch.manual_seed(77 + dist.get_rank())  # data-parallel ranks drop different elements
        mols = None if way == "stock" else building.attach(built, chain, scheduler, PROBE.section | NO_EFFECT)
        if way == "forgetful":
            mols.window.open_pass = lambda: None
        prints, window, drawn, before = [], [], [], None
        iteration = 0
        while len(prints) < PROBE.updates:
            if mols is not None and mols.phase == "calibrating":
                before = before or everything(built, chain, scheduler)
                done = building.step(built, chain, scheduler, 300 + len(window))
                assert not done.successful and done.grad_norm is None
                window.append(everything(built, chain, scheduler))
                open_window = mols.window.state_dict()
                drawn.append((random_state(), open_window and digest(open_window["stream"][0])))
                continue
            assert building.step(built, chain, scheduler, iteration).successful
            iteration += 1
            prints.append(everything(built, chain, scheduler))
        return {"prints": prints, "before": before, "window": window, "drawn": drawn, "alphas": mols and mols.alphas}


# --- fp16 -----------------------------------------------------------------------------------------------------------


def scale(setup: Setup, initial: float, iterations: Iterable[int]) -> dict[str, Any]:
    """On each rank: a probe from the start on these iterations, under a dynamic loss scale that begins at `initial`."""
    from megatron_patches.cpu.emulation import cpu_megatron

    plan = Plan(start=0, samples=HALF_SAMPLES, ramp_end=4, updates=2, warmup=1)
    with cpu_megatron():
        building.start(setup)
        built = building.build(setup)
        more = dict(initial_loss_scale=initial, hysteresis=1, loss_scale_window=1000)
        chain, scheduler = building.optimizer(built, iterations=plan.updates, warmup=plan.warmup, **more)
        mols = building.attach(built, chain, scheduler, plan.section)
        scales, usable = [initial], []
        for iteration in iterations:
            before = mols.samples
            assert not building.step(built, chain, scheduler, iteration).successful
            scales.append(float(chain.get_loss_scale()))
            if mols.samples > before:
                usable.append(iteration)
            if mols.phase != "calibrating":
                break
        return {
            "alphas": {group: alpha.hex() for group, alpha in mols.alphas.items()},
            "rows": mols.report()["groups"],
            "skipped": mols.report()["skipped_samples"],
            "usable": usable,
            "scales": scales,
            "updates": [building.step(built, chain, scheduler, 1000 + i).successful for i in range(plan.updates)],
        }


def overflow(setup: Setup) -> dict[str, Any]:
    """A run whose first samples overflow, and one with its last loss scale on the batches of those that did not."""
    overflowing = scale(setup, OVERFLOWING, itertools.count())
    return {"overflowing": overflowing, "calm": scale(setup, overflowing["scales"][-1], overflowing["usable"])}


def work(kind: str, setup: Setup, *more: Any) -> dict[str, Any]:
    return drop(setup, *more) if kind == "drop" else overflow(setup)


@functools.cache
def results() -> Results:
    cases: list[tuple[Any, ...]] = [("drop", DROPPED[grid], way) for grid in GRIDS.wanted for way in WAYS[:2]]
    cases += [("drop", DROPPED[grid], "forgetful") for grid in FORGETFUL.wanted]
    return run_cases(work, WORLD, cases + [("overflow", SCALED[grid]) for grid in OVERFLOWED.wanted], timeout=60)


@GRIDS.parametrize("grid")
def test_a_probe_leaves_no_trace(grid: str) -> None:
    """Bit for bit, with dropout active: the window itself, and each update behind it."""
    setup = DROPPED[grid]
    for stock, probed in zip(results()["drop", setup, "stock"], results()["drop", setup, "probed"], strict=True):
        assert set(probed["alphas"].values()) == {1.0}
        before, window = probed["before"], probed["window"]
        assert len(window) == PROBE.samples
        assert [key for key in before if before[key] != window[-1][key]] == []
        # the window drew separate random numbers, different for each sample
        assert probed["drawn"][-1] == (before["random"], None) and len({*probed["drawn"]}) == PROBE.samples
        assert len(stock["prints"]) == len(probed["prints"]) == PROBE.updates
        for update, (expected, seen) in enumerate(zip(stock["prints"], probed["prints"], strict=True)):
            assert [key for key in expected if expected[key] != seen.get(key)] == [], update
            assert seen.keys() == expected.keys()
        assert len({prints["random"] for prints in stock["prints"]}) == PROBE.updates  # dropout was active


@GRIDS.reads("tp2")
@FORGETFUL.reads("tp2")
def test_a_forgotten_random_state_would_be_seen() -> None:
    """The comparison is sharp: without putting the random state back, dropout and hence the weights differ."""
    setup = DROPPED["tp2"]
    stock = results()["drop", setup, "stock"][0]["prints"]
    forgetful = results()["drop", setup, "forgetful"][0]["prints"]
    assert stock[PROBE.start - 1] == forgetful[PROBE.start - 1]
    assert any(stock[-1][key] != forgetful[-1][key] for key in stock[-1] if key.startswith("weight"))


@OVERFLOWED.parametrize("grid")
def test_overflowing_samples_are_left_out(grid: str) -> None:
    """The loss scale falls in the window as in training; the alphas are those of the samples that did not overflow."""
    ranks = results()["overflow", SCALED[grid]]
    for outcome in ranks:
        ours, calm = outcome["overflowing"], outcome["calm"]
        assert ours["skipped"] >= 1 and calm["skipped"] == 0
        assert len(ours["usable"]) == len(calm["usable"]) == HALF_SAMPLES
        assert ours["usable"][0] > 0, "the first sample overflowed"
        assert ours["scales"][1] == OVERFLOWING / 2
        assert ours["scales"][-1] == OVERFLOWING / 2 ** ours["skipped"]
        assert ours["alphas"] == ranks[0]["overflowing"]["alphas"] and len(set(ours["alphas"].values())) > 3
        for group, row in calm["rows"].items():
            for key in ("snr_mean", "snr_pooled", "damping", "alpha"):
                assert ours["rows"][group][key] == pytest.approx(row[key], rel=HALF_RTOL), (group, key)
        assert ours["updates"] == calm["updates"] == [True, True]
