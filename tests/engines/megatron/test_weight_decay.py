"""Scaled and unscaled weight decay under Megatron-core against a reference that writes the decay out."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.engines.megatron import oracle
from tests.engines.megatron.building import Setup, attach, build, optimizer, start
from tests.engines.megatron.grids import EMBEDDING, Plan, run, tiny
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

WORLD, DECAY = 2, 2.0
ATOL = 2e-6  # as in test_weights.py
DIFFERENCE = 1e-4  # of the two values
UNSCALED = Plan(decay="unscaled")
GRIDS: dict[str, tuple[Setup, Plan]] = {
    "TP2": (tiny(tp=2, weight_decay=DECAY), UNSCALED),
    "DP2": (tiny(weight_decay=DECAY), UNSCALED._replace(mode="online")),
    "DP2 plain": (tiny(distributed=False, weight_decay=DECAY), UNSCALED._replace(mode="moments")),
    "TP2 scaled": (tiny(tp=2, weight_decay=DECAY), Plan()),
}
CASES = Cases([*GRIDS, "refused"], quick=["TP2"])


def refused() -> dict[str, str]:
    """On each rank: message of attach for each optimizer."""
    from megatron_patches.cpu.emulation import cpu_megatron
    from mols_ds.errors import MolsError

    said = {}
    for name, decay in (("sgd", DECAY), ("sgd", 0.0), ("adam", DECAY)):
        with cpu_megatron():
            setup = tiny(weight_decay=decay, distributed=False)
            start(setup)
            built = build(setup)
            chain, scheduler = optimizer(built, optimizer=name)
            try:
                attach(built, chain, scheduler, {**UNSCALED.section, "mode": "online"})
            except MolsError as error:
                said[f"{name} {decay}"] = str(error)
            else:
                said[f"{name} {decay}"] = ""
    return said


def work(name: str) -> Any:
    return refused() if name == "refused" else run(*GRIDS[name])


@functools.cache
def outcomes() -> Results:
    return run_cases(work, WORLD, [(name,) for name in CASES.wanted], timeout=90)


@functools.cache
def truth(setup: Setup, decay: str, plan: Plan) -> oracle.Truth:
    """The reference, in a separate process."""
    case = ("reference", oracle.plain(setup), plan._replace(decay=decay))
    found: oracle.Truth = run_cases(oracle.work, 1, [case], timeout=90)[case][0]
    return found


@CASES.parametrize("name", list(GRIDS))
def test_weights_equal_per_element_adamw(name: str) -> None:
    setup, plan = GRIDS[name]
    reference, other = (
        truth(setup, decay, plan) for decay in sorted(("scaled", "unscaled"), key=lambda d: d != plan.decay)
    )
    farthest = 0.0
    for outcome in outcomes()[name,]:
        assert outcome["report"]["weight_decay"] == plan.decay
        for key, part in outcome["weights"].items():
            logical = key if key in reference.weights else EMBEDDING
            expected, wrong = (part.of(key, whole[logical]) for whole in (reference.weights, other.weights))
            assert float((part.values - expected).abs().max()) <= ATOL, key
            farthest = max(farthest, float((part.values - wrong).abs().max()))
    assert farthest > DIFFERENCE, "the two values differ far beyond the tolerance"


@CASES.reads("refused")
def test_what_cannot_be_unscaled_is_refused_by_name() -> None:
    for said in outcomes()["refused",]:
        assert said["adam 2.0"] == "" and said["sgd 0.0"] == ""
        assert '"weight_decay": "unscaled" with SGD (' in said["sgd 2.0"] and "\n" not in said["sgd 2.0"]
