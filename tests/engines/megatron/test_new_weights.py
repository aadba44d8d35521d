"""Weights unfrozen, added or frozen after attach under Megatron-core: the behaviour, and the warnings."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from megatron_patches.cpu.emulation import cpu_megatron
from tests.engines.megatron import building
from tests.engines.megatron.building import Setup
from tests.helpers.digests import caught
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

WORLD, NAME = 2, "output_layer.weight"
SETUPS = {
    "distributed": Setup(),
    "TP2, bf16": Setup(tp=2, dtype="bfloat16"),
    "plain": Setup(distributed=False),
    "plain, bf16": Setup(distributed=False, dtype="bfloat16"),
}
SECTION: dict[str, Any] = {"fixed_alphas": {"mlp": 2.0}, "start": 2, "ramp_end": 2}
MEASURED: dict[str, Any] = {"start": 1, "samples": 4, "ramp_end": 9, "noise_floor_correction": False}


def output_layer(model: Any) -> Any:
    return next(p for name, p in model.named_parameters() if name.endswith(NAME))


def unfrozen(name: str) -> dict[str, Any]:
    """On each rank: the output layer is frozen when the optimizer is built, and trains later, or not."""
    with cpu_megatron():
        setup = SETUPS[name]
        building.start(setup)
        built = building.build(setup, lambda model: output_layer(model).requires_grad_(False))
        optimizer, scheduler = building.optimizer(built)
        mols = building.attach(built, optimizer, scheduler, SECTION)
        building.step(built, optimizer, scheduler, 0)
        weight = output_layer(built.chunks[0])
        before = weight.detach().clone()
        with caught() as warned:
            weight.requires_grad_(True)
            for iteration in range(1, 4):
                building.step(built, optimizer, scheduler, iteration)
        moved = float((weight.detach() - before).abs().max())
        mols.detach()
    return {"moved": moved, "warned": [text for text in warned if NAME in text]}


def frozen(name: str, mode: str) -> dict[str, Any]:
    """On each rank: the output layer is frozen before the first sample."""
    with cpu_megatron():
        setup = SETUPS[name]
        building.start(setup)
        built = building.build(setup)
        optimizer, scheduler = building.optimizer(built)
        mols = building.attach(built, optimizer, scheduler, {**MEASURED, "mode": mode})
        for iteration in range(8):
            if iteration == 1:
                output_layer(built.chunks[0]).requires_grad_(False)
            building.step(built, optimizer, scheduler, iteration)
        return {"report": mols.report()["groups"], "alphas": mols.alphas}


def work(kind: str, *arguments: str) -> dict[str, Any]:
    return {"unfrozen": unfrozen, "frozen": frozen}[kind](*arguments)


CASES = Cases(
    [
        *(("unfrozen", name) for name in SETUPS),
        *(("frozen", name, mode) for name in SETUPS for mode in ("probe", "online")),
    ],
    quick=[("unfrozen", "distributed")],
)


@functools.cache
def outcomes() -> Results:
    return run_cases(work, WORLD, CASES.wanted, timeout=120)


@CASES.parametrize(("kind", "name"), [("unfrozen", name) for name in SETUPS])
def test_an_unfrozen_weight_does_not_train_and_is_named_once(kind: str, name: str) -> None:
    for found in outcomes()[kind, name]:
        assert found["moved"] == 0
        (line,) = found["warned"]
        assert "do not train; unfreeze them before DistributedDataParallel" in line and "\n" not in line


@CASES.parametrize(("kind", "name", "mode"), [("frozen", n, m) for n in SETUPS for m in ("probe", "online")])
def test_a_weight_that_is_frozen_later_counts_as_zero(kind: str, name: str, mode: str) -> None:
    for found in outcomes()[kind, name, mode]:
        assert found["report"]["head"]["never_moved_share"] == 1.0
        assert found["report"]["mlp"]["never_moved_share"] < 0.5
        assert found["alphas"]["head"] == 1.0
