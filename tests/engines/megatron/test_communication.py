"""What a calibration costs: one small all-reduce, and 8 bytes for each element that a rank owns."""

from __future__ import annotations

import functools
import gc
from collections import Counter
from typing import Any

import pytest
import torch

from tests.engines.megatron import building
from tests.engines.megatron.building import Setup
from tests.engines.megatron.grids import owned, tiny
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

WORLD, START, SAMPLES = 2, 1, 6
ONE_ALL_REDUCE = 262_144  # bytes: 256 KiB, the requirement
FLAG = 8  # bytes: in mode "probe", whether every rank has a finite sample
BYTES_AN_ELEMENT, BYTES_RTOL = 8, 0.01
FREED_SHARE = 0.25  # of the accumulators' bytes; below it nothing of their size can be alive
VOCABULARY = 4096  # 280,000 elements, against which the fixed costs of the accumulators vanish

GRIDS: dict[str, Setup] = {
    "tp2 sp": tiny(tp=2, sp=True),
    "pp2 tied": tiny(pp=2, tied=True),
    "dp2": tiny(),
    "dp2 plain": tiny(distributed=False),
    "ep2": tiny(ep=2, experts=4),
}
Traffic = Counter[tuple[str, int]]


def communicate(setup: Setup, mode: str) -> dict[str, Any]:
    """On each rank: messages from the window's first iteration to its last; mode "stock" has no MoLS."""
    from megatron_patches.cpu.emulation import cpu_megatron
    from tests.helpers.recorder import Recorder

    with cpu_megatron():
        building.start(setup)
        built = building.build(setup)
        chain, scheduler = building.optimizer(built)
        section = {"mode": mode, "start": START, "samples": SAMPLES, "ramp_end": 20, "estimator": "damping"}
        mols = None if mode == "stock" else building.attach(built, chain, scheduler, section)
        for iteration in range(START):
            building.step(built, chain, scheduler, iteration)
        with Recorder() as recorder:
            for iteration in range(START, START + SAMPLES):
                building.step(built, chain, scheduler, iteration)
        return {"sent": recorder.torch, "phase": mols and mols.phase}


def _alive() -> int:
    """Bytes of every tensor storage that Python can reach."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def weigh(setup: Setup, mode: str) -> dict[str, Any]:
    """On each rank: accumulator bytes and living storages before, in the middle of and after a calibration."""
    from megatron_patches.cpu.emulation import cpu_megatron

    with cpu_megatron():
        building.start(setup)
        built = building.build(setup)
        chain, scheduler = building.optimizer(built)
        section = {"mode": mode, "start": START, "samples": SAMPLES, "ramp_end": 20, "estimator": "damping"}
        mols = building.attach(built, chain, scheduler, section)
        held, alive = [], []
        for iteration in range(START + SAMPLES):
            if iteration in (START, START + SAMPLES // 2):
                held.append(mols.accumulator_bytes)
                alive.append(_alive())
            building.step(built, chain, scheduler, iteration)
        held.append(mols.accumulator_bytes)
        alive.append(_alive())
        mine = sum(numel for _, _, numel in owned(built, mols))
        total = sum(row["elements"] for row in mols.report()["groups"].values())
        return {"held": held, "alive": alive, "owned": mine, "total": total, "phase": mols.phase}


WEIGHED = {
    "tp2 online": (tiny(tp=2, vocab=VOCABULARY), "online"),
    "dp2 probe": (tiny(vocab=VOCABULARY), "probe"),
    "dp2 plain online": (tiny(vocab=VOCABULARY, distributed=False), "online"),
}

COMMUNICATED = Cases(
    [*((grid, mode) for grid in GRIDS for mode in ("stock", "online", "probe")), ("dp2", "moments")],
    quick=lambda case: case[0] == "tp2 sp",
    needs=lambda case: [(case[0], "stock")],
)
WEIGHTS = Cases(WEIGHED, quick=["dp2 probe"])


def work(kind: str, setup: Setup, mode: str) -> dict[str, Any]:
    return communicate(setup, mode) if kind == "communicate" else weigh(setup, mode)


@functools.cache
def results() -> Results:
    communicated = [("communicate", GRIDS[grid], mode) for grid, mode in COMMUNICATED.wanted]
    return run_cases(work, WORLD, [*communicated, *(("weigh", *WEIGHED[name]) for name in WEIGHTS.wanted)], timeout=60)


def traffic(grid: str, mode: str, rank: int) -> Traffic:
    outcome = results()["communicate", GRIDS[grid], mode][rank]
    assert outcome["phase"] == (None if mode == "stock" else "ramping")
    sent: Traffic = outcome["sent"]
    return sent


def _without_routing(sent: Traffic) -> Traffic:
    """Weights, which a probe does not change, route tokens to experts: only the number of those calls counts."""
    result: Traffic = Counter()
    for (name, size), count in sent.items():
        result[name, 0 if name.startswith("all_to_all") else size] += count
    return result


def _check_two(extra: Traffic, rows: int) -> None:
    """Only a byte for each token, whether it occurred, and the group sums."""
    assert {name for name, _ in extra} == {"allreduce"}
    flags, sums = sorted(size for _, size in extra.elements())
    assert flags == rows < sums <= ONE_ALL_REDUCE


@COMMUNICATED.parametrize(("grid", "mode"), [*((grid, "online") for grid in GRIDS), ("dp2", "moments")])
def test_training_modes_add_two_small_all_reduces(grid: str, mode: str) -> None:
    for rank in range(WORLD):
        stock, ours = traffic(grid, "stock", rank), traffic(grid, mode, rank)
        assert stock, "the recorder sees Megatron's own collectives"
        assert stock - ours == Counter()
        extra = ours - stock
        _check_two(extra, GRIDS[grid].vocab)


@COMMUNICATED.parametrize("grid", GRIDS, reads=lambda grid: [(grid, "probe")])
def test_probe_adds_two_small_all_reduces_and_a_flag_a_sample(grid: str) -> None:
    """The flag replaces the messages of the skipped step: its norm, and the weights."""
    for rank in range(WORLD):
        stock, ours = (_without_routing(traffic(grid, mode, rank)) for mode in ("stock", "probe"))
        extra, saved = ours - stock, stock - ours
        assert extra.pop(("allreduce", FLAG)) == SAMPLES
        _check_two(extra, GRIDS[grid].vocab)
        norms = sum(count for (name, size), count in saved.items() if name == "allreduce" and size <= FLAG)
        assert norms >= SAMPLES, "a step would have reduced the gradient norm"
        large = {name for name, size in saved if size > FLAG}
        assert all("gather" in name for name in large), "gradients are reduced as ever"
        assert bool(large) == GRIDS[grid].distributed, "a step would have gathered the weights"


@WEIGHTS.parametrize("name")
def test_accumulators_take_eight_bytes_an_owned_element(name: str) -> None:
    outcomes = results()["weigh", *WEIGHED[name]]
    assert sum(outcome["owned"] for outcome in outcomes) == outcomes[0]["total"] > 130_000
    for outcome in outcomes:
        before, during, after = outcome["held"]
        assert before == after == 0 and outcome["phase"] == "ramping"
        assert during == pytest.approx(BYTES_AN_ELEMENT * outcome["owned"], rel=BYTES_RTOL)


@WEIGHTS.parametrize("name")
def test_accumulators_are_freed(name: str) -> None:
    for outcome in results()["weigh", *WEIGHED[name]]:
        before, during, after = outcome["alive"]
        size = outcome["held"][1]
        assert during - before >= (1 - BYTES_RTOL) * size, "the accumulators are visible to the test"
        assert after - before < FREED_SHARE * size
