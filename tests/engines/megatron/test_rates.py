"""The applied rate is the scheduler's rate times the multiplier, for every schedule, override and phase."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from megatron_patches.cpu.emulation import cpu_megatron
from tests.engines.megatron import building
from tests.engines.megatron.applied import Watch
from tests.engines.megatron.building import Setup, samples_per_step
from tests.engines.megatron.running import SECTION
from tests.helpers.digests import caught
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

WORLD, ITERATIONS, LR = 2, 16, 1e-2
MUP_WIDTH = 4.0  # hidden size over that of the model whose rates muP transfers
# fp32: a weight of 1 (a norm) is rounded to 6e-8, its update is at least 0.2 x 1e-3.
TOLERANCE = 5e-4
STYLES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "constant": {},
    "WSD": {"wsd_decay_steps": 4, "lr_wsd_decay_style": "linear"},
}


def overrides(kind: str, config: Any) -> Any:
    """`config_overrides` of get_megatron_optimizer: a rate and a decay of the user's own for some parameters."""
    if kind == "":
        return None
    from megatron.core.optimizer import ParamKey, get_standard_config_overrides

    if kind == "mup":
        from megatron.core.optimizer import get_mup_config_overrides  # not in 0.16

        return {**get_standard_config_overrides(config), **get_mup_config_overrides(config, MUP_WIDTH)}
    return {
        **get_standard_config_overrides(config),
        ParamKey(name="*linear_proj.weight"): {"max_lr": LR / 2, "min_lr": LR / 50},
        ParamKey(name="*linear_fc2.weight"): {"wd_mult": 2.0},
    }


def make(setup: Setup, section: dict[str, Any], style: str, kind: str = "", **settings: Any) -> tuple[Any, ...]:
    """(built, optimizer, scheduler, mols)."""
    building.start(setup)
    built = building.build(setup)
    unit = samples_per_step(setup)
    optimizer, scheduler = building.optimizer(
        built,
        iterations=ITERATIONS,
        init_lr=LR / 10,  # the first step moves the weights too
        style=style,
        decay={key: value * unit if isinstance(value, int) else value for key, value in STYLES[style].items()},
        groups=functools.partial(overrides, kind),
        **{"lr": LR, "min_lr": LR / 10, **settings},
    )
    return built, optimizer, scheduler, building.attach(built, optimizer, scheduler, section)


def watched(setup: Setup, section: dict[str, Any], style: str, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Rates of each iteration: applied, and the scheduler's."""
    with cpu_megatron():
        built, optimizer, scheduler, mols = make(setup, section, style, kind, **settings)
        if kind == "tensor":
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]))
        watch = Watch(mols)
        rows = []
        for iteration in range(ITERATIONS):
            phase, step, before = mols.phase, mols.steps, scheduler.num_steps
            said = sorted({scheduler.get_lr(group) for group in optimizer.param_groups if group["params"]})
            watch.start()
            successful = building.step(built, optimizer, scheduler, iteration).successful
            rows.append(
                {
                    "phase": phase,
                    "step": step,
                    "successful": successful,
                    "scheduler": (scheduler.num_steps - before) // samples_per_step(setup),
                    "said": said,
                    "bases": sorted(watch.bases),
                    "rates": dict(watch.rates),
                    "multipliers": mols.multipliers,
                    "applied_lrs": mols.applied_lrs,
                    "begun": mols.controller.state.begun_at,
                    "ended": mols.controller.state.ended_at,
                    "alphas": mols.alphas,
                }
            )
        building.stop()
    return {"rows": rows, "schedule": (mols.controller.state.schedule.start, mols.controller.state.schedule.ramp_end)}


ONLINE = {**SECTION, "mode": "online", "ramp_end": 11}
PROBE = {**SECTION, "ramp_end": 8}
FIXED = {**SECTION, "fixed_alphas": {"embedding": 3.0, "qk": 0.5, "vo": 2.0}, "start": 1, "ramp_end": 6}
CASES: dict[str, tuple[Setup, dict[str, Any], str, str, dict[str, Any]]] = {
    "linear": (Setup(tp=2), PROBE, "linear", "", {}),
    "cosine": (Setup(), PROBE, "cosine", "", {}),
    "constant": (Setup(pp=2, tied=True), ONLINE, "constant", "", {}),
    "WSD": (Setup(distributed=False), PROBE, "WSD", "", {}),
    "decoupled rates": (Setup(tp=2), PROBE, "cosine", "", {"decoupled_lr": 3 * LR, "decoupled_min_lr": LR / 5}),
    "the user's overrides": (Setup(), PROBE, "cosine", "overrides", {}),
    "16-bit weights": (Setup(dtype="bfloat16", experts=4, ep=2), PROBE, "cosine", "", {}),
    "rates as tensors": (Setup(), PROBE, "cosine", "tensor", {}),
    "fixed_alphas": (Setup(tp=2), FIXED, "cosine", "", {}),
}
COUNTED = ("skipped fp16", "recalibrate")
NAMES = Cases([*CASES, *COUNTED], quick=["linear", "constant"], full=["cosine"])


@functools.cache
def outcomes() -> Results:
    return run_cases(_case, WORLD, [(name,) for name in NAMES.wanted], timeout=60)


def _case(name: str) -> Any:
    return watched(*CASES[name]) if name in CASES else OTHERS[name]()


def expected(row: dict[str, Any], group: str, schedule: tuple[int, int]) -> float:
    """Multiplier of METHOD.md: 1 before the end of the calibration, then 1 + (alpha - 1) f(t)."""
    alpha = row["alphas"].get(group, 1.0)
    if row["phase"] in ("waiting", "calibrating"):
        return 1.0
    ramped = (row["step"] - row["ended"]) / (schedule[1] - row["ended"])
    return 1.0 + (alpha - 1.0) * min(1.0, ramped)


def is_one_of(rate: float, said: list[float]) -> bool:
    """Whether the scheduler gave this rate to some parameter group; a tensor rounds it to fp32."""
    return any(rate == pytest.approx(one, rel=1e-6) for one in said)


def check(ranks: list[dict[str, Any]], section: dict[str, Any]) -> None:
    """Assert on what `watched` returned on each rank."""
    seen: set[str] = set()
    for found in ranks:
        phases = {row["phase"] for row in found["rows"]}
        wanted = {"waiting", "ramping", "fixed"} | (set() if "fixed_alphas" in section else {"calibrating"})
        assert phases == wanted
        for row in found["rows"]:
            skipped = row["phase"] == "calibrating" and section.get("mode") != "online"
            assert row["successful"] is not skipped and row["scheduler"] == (0 if skipped else 1)
            if skipped:
                assert row["rates"] == {} and row["bases"] == []
                continue
            assert row["bases"] and all(is_one_of(base, row["said"]) for base in row["bases"])
            for group, rate in row["rates"].items():
                multiplier = expected(row, group, found["schedule"])
                assert rate.low == pytest.approx(multiplier, rel=TOLERANCE), (row["step"], group)
                assert rate.high == pytest.approx(multiplier, rel=TOLERANCE), (row["step"], group)
                assert row["multipliers"][group] == pytest.approx(multiplier, rel=1e-12)
                assert is_one_of(row["applied_lrs"][group] / multiplier, row["said"])
                seen.add(group)
        last = found["rows"][-1]
        assert last["phase"] == "fixed" and max(last["alphas"].values()) > 1.2 * min(last["alphas"].values())
    assert seen >= {"embedding", "qk", "vo", "mlp", "other"}


@NAMES.parametrize("name", CASES)
def test_the_applied_rate_is_the_schedulers_times_the_multiplier(name: str) -> None:
    check(outcomes()[name,], CASES[name][1])


# --- counting -------------------------------------------------------------------------------------------------------


def skipped_fp16() -> dict[str, Any]:
    """A loss scale that overflows at first: those iterations are neither updates nor samples."""
    setup = Setup(dtype="float16")
    with cpu_megatron(), caught() as warned:
        built, optimizer, scheduler, mols = make(
            setup, {**SECTION, "mode": "online", "start": 0}, "cosine", initial_loss_scale=2.0**40
        )
        rows = []
        for iteration in range(32):
            successful = building.step(built, optimizer, scheduler, iteration % 8).successful
            rows.append((successful, mols.steps, mols.samples, mols.phase))
        building.stop()
    return {"rows": rows, "scheduler": scheduler.num_steps // samples_per_step(setup), "warned": len(warned)}


def recalibrated() -> dict[str, Any]:
    with cpu_megatron():
        section = {**SECTION, "mode": "online", "ramp_end": 8, "recalibrate": {"every": 4}}
        built, optimizer, scheduler, mols = make(Setup(), section, "cosine")
        rows = []
        for iteration in range(16):
            phase, rates = mols.phase, mols.controller.rates(mols.steps)
            building.step(built, optimizer, scheduler, iteration)
            rows.append((phase, rates, mols.multipliers, mols.alphas))
        building.stop()
    return {"rows": rows}


OTHERS = dict(zip(COUNTED, (skipped_fp16, recalibrated), strict=True))


@NAMES.reads("skipped fp16")
def test_a_skipped_iteration_is_neither_an_update_nor_a_sample() -> None:
    for found in outcomes()["skipped fp16",]:
        rows = found["rows"]
        updates = [row for row in rows if row[0]]
        assert not rows[0][0] and len(updates) > 4, "the loss scale overflows, and falls until it fits"
        steps = 0
        for number, (successful, counted, samples, _) in enumerate(rows):  # the scale may be too high again later
            steps += successful
            assert counted == steps, number
            assert samples <= steps, number
        assert found["scheduler"] == len(updates)


@NAMES.reads("recalibrate")
def test_recalibration_begins_at_the_multipliers_of_before() -> None:
    for found in outcomes()["recalibrate",]:
        phases = [row[0] for row in found["rows"]]
        again = phases.index("calibrating", phases.index("fixed"))
        first, second = found["rows"][again - 1], found["rows"][again]
        assert second[2] == first[3], "the alphas of before stay while it measures"
        later = found["rows"][again + 4]
        assert later[0] == "ramping" and later[3] != first[3] and later[1] == pytest.approx(first[3])
