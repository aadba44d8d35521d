"""Models beyond the plain decoder have the same alphas however they are cut: MTP, grouped and shared experts."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from megatron_patches.cpu.emulation import cpu_megatron
from tests.engines.megatron import building
from tests.engines.megatron.building import Setup
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

WORLD = 2
SECTION = {"start": 0, "ramp_end": 6, "samples": 4, "mode": "online"}
RTOL, BF16_RTOL = 1e-5, 0.02
MODELS = {
    "MTP": (Setup(mtp=1), Setup(mtp=1, pp=2)),
    # The last stage has a copy of the embedding and an output layer that is never used
    "MTP tied": (Setup(mtp=1, tied=True), Setup(mtp=1, tied=True, pp=2)),
    "learned positions": (Setup(position="learned"), Setup(position="learned", pp=2)),
    "shared expert": (Setup(experts=4, shared_expert=True), Setup(experts=4, shared_expert=True, ep=2)),
    "grouped experts": (
        Setup(experts=4, grouped=True, dtype="bfloat16"),
        Setup(experts=4, grouped=True, ep=2, dtype="bfloat16"),
    ),
}

NAMES = Cases(MODELS)


def measure(setup: Setup) -> dict[str, Any]:
    """On each rank: the report after one calibration, and the owned ranges."""
    import megatron_patches

    with cpu_megatron():
        building.start(setup)
        built = building.build(setup)
        optimizer, scheduler = building.optimizer(built)
        mols = building.attach(built, optimizer, scheduler, SECTION)
        assert isinstance(mols, megatron_patches.engine.MegatronMols)
        pieces = [(piece.name, piece.start, piece.numel) for piece in mols.shards.accumulated]
        for iteration in range(SECTION["samples"] + 1):  # type: ignore[operator]
            building.step(built, optimizer, scheduler, iteration)
        report = mols.report()["groups"]
        building.stop()
    return {"report": report, "pieces": pieces}


@functools.cache
def outcomes() -> Results:
    return run_cases(measure, WORLD, [(setup,) for name in NAMES.wanted for setup in MODELS[name]], timeout=60)


@NAMES.parametrize("name")
def test_alphas_are_the_same_however_the_model_is_cut(name: str) -> None:
    replicated, cut = (outcomes()[setup,] for setup in MODELS[name])
    rtol = BF16_RTOL if "grouped" in name else RTOL
    for one, other in zip(replicated, cut, strict=True):
        assert list(one["report"]) == list(other["report"])
        for group, row in one["report"].items():
            assert other["report"][group]["elements"] == row["elements"], group
            assert other["report"][group]["alpha"] == pytest.approx(row["alpha"], rel=rtol), group
    assert len({row["alpha"] for row in replicated[0]["report"].values()}) > 2


@NAMES.reads("MTP")
def test_a_parameter_straddles_the_ranks() -> None:
    """The hard case of the distributed optimizer: ranks own different parts, and one weight is on both."""
    first, second = ({name: (start, n) for name, start, n in rank["pieces"]} for rank in outcomes()[Setup(mtp=1),])
    shared = set(first) & set(second)
    assert shared and set(first) != set(second)
    for name in shared:
        (low, n), (high, _) = sorted((first[name], second[name]))
        assert low + n == high, name
