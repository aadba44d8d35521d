"""What a calibration costs: one small all-reduce, and 8 bytes for each element that a rank owns."""

from __future__ import annotations

import functools
import gc
from collections import Counter
from typing import Any

import pytest
import torch

from tests.engines.deepspeed.engines import CLIP, STAGES, config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.models import model_of
from tests.engines.deepspeed.state import owned
from tests.helpers.harness import Results, run_cases
from tests.helpers.oracle.adamw import AdamSettings
from tests.helpers.oracle.models import GROUPS
from tests.helpers.oracle.sizes import VOCABULARY
from tests.helpers.recorder import Recorder
from tests.helpers.tiers import Cases

WORLD, START, SAMPLES = 2, 1, 6
ONE_ALL_REDUCE = 262_144  # bytes: 256 KiB, the requirement
BYTES_AN_ELEMENT, BYTES_RTOL = 8, 0.01
BALANCE_RTOL = 0.02  # a rank's share of the elements at stages 0 to 2; padding and rounding to whole tensors' ends
SCALE = 20  # vocabulary of 1,940 tokens: 180,000 elements, against which fixed costs of the accumulators vanish
FREED_SHARE = 0.25  # of the accumulators' bytes; below it nothing of their size can be alive
SETTINGS = AdamSettings(lr=1e-3, eps=1e-5, clip=CLIP)


def section(mode: str) -> dict[str, Any]:
    return {"mode": mode, "start": START, "samples": SAMPLES, "ramp_end": 20, "estimator": "damping"}


def communicate(stage: int, mode: str) -> dict[str, Any]:
    """On each rank: messages from the window's first iteration to its last; mode "stock" has no MoLS."""
    engine = engine_of(config(stage, None if mode == "stock" else section(mode)), "llama", SETTINGS)
    for iteration in range(START):
        iterate(engine, iteration)
    with Recorder() as recorder:
        for iteration in range(START, START + SAMPLES):
            iterate(engine, iteration)
    phase = None if mode == "stock" else engine.mols.phase
    engine.destroy()
    return {"torch": recorder.torch, "deepspeed": recorder.deepspeed, "phase": phase}


def _alive() -> dict[int, int]:
    """Bytes of every tensor storage that Python can reach, by address.

    Each of gloo's worker threads holds the tensor that it reduced last until its next job: give them small ones.
    """
    for _ in range(8):
        torch.distributed.all_reduce(torch.zeros(1))
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return storages


def weigh(stage: int) -> dict[str, Any]:
    """On each rank: accumulator bytes and living storages before, in the middle of and after an online calibration."""
    engine = engine_of(config(stage, section("online")), model_of("llama", scale=SCALE), SETTINGS)
    for iteration in range(START):
        iterate(engine, iteration)
    at_start, before = engine.mols.accumulator_bytes, sum(_alive().values())
    for iteration in range(START, START + SAMPLES // 2):
        iterate(engine, iteration)
    at_middle, during = engine.mols.accumulator_bytes, sum(_alive().values())
    for iteration in range(START + SAMPLES // 2, START + SAMPLES):
        iterate(engine, iteration)
    at_end, after = engine.mols.accumulator_bytes, sum(_alive().values())
    pieces = owned(engine)
    whole = {name: p.ds_numel if hasattr(p, "ds_numel") else p.numel() for name, p in engine.module.named_parameters()}
    engine.destroy()
    return {
        "bytes": (at_start, at_middle, at_end),
        "alive": (before, during, after),
        "owned": sum(piece[2] for piece in pieces),
        "total": sum(whole.values()),
    }


QUICK_STAGE = 3
COMMUNICATED = Cases(
    [(stage, mode) for stage in STAGES for mode in ("stock", "online", "probe")],
    quick=lambda case: case[0] == QUICK_STAGE,
    needs=lambda case: [(case[0], "stock")],
)
WEIGHED = Cases(STAGES, quick=[QUICK_STAGE])


@functools.cache
def traffic() -> Results:
    return run_cases(communicate, WORLD, COMMUNICATED.wanted, timeout=120)


@functools.cache
def weights() -> Results:
    return run_cases(weigh, WORLD, [(stage,) for stage in WEIGHED.wanted], timeout=120)


@pytest.mark.parametrize("level", ["torch", "deepspeed"])
@COMMUNICATED.parametrize("stage", STAGES, reads=lambda stage: [(stage, "online")])
def test_online_adds_two_small_all_reduces(stage: int, level: str) -> None:
    for rank in range(WORLD):
        stock, ours = traffic()[stage, "stock"][rank][level], traffic()[stage, "online"][rank][level]
        assert stock, "the recorder sees the engine's own collectives"
        assert traffic()[stage, "online"][rank]["phase"] == "ramping"
        assert stock - ours == Counter()
        extra = ours - stock
        if level == "deepspeed" and not extra:
            continue  # sent through torch.distributed, which the other level sees
        assert {name.replace("_", "") for name, _ in extra} == {"allreduce"}
        flags, sums = sorted(size for _, size in extra.elements())
        assert flags == VOCABULARY  # a byte for each token: did it occur?
        assert VOCABULARY < sums <= ONE_ALL_REDUCE


@COMMUNICATED.parametrize("stage", STAGES, reads=lambda stage: [(stage, "probe")])
def test_probe_sends_nothing_else(stage: int) -> None:
    """A probe skips the updates, so it may send less than training, and nothing more but its two all-reduces."""
    for rank in range(WORLD):
        stock, ours = (traffic()[stage, mode][rank]["torch"] for mode in ("stock", "probe"))
        assert traffic()[stage, "probe"][rank]["phase"] == "ramping"
        for name in {name for name, _ in ours}:
            calls, sent = _sum(ours, name)
            stock_calls, stock_sent = _sum(stock, name)
            extra_calls, extra_bytes = (2, VOCABULARY + ONE_ALL_REDUCE) if name == "allreduce" else (0, 0)
            assert calls <= stock_calls + extra_calls, name
            assert sent <= stock_sent + extra_bytes, name


def _sum(counter: Counter[tuple[str, int]], name: str) -> tuple[int, int]:
    rows = [(count, size) for (operation, size), count in counter.items() if operation == name]
    return sum(count for count, _ in rows), sum(count * size for count, size in rows)


@WEIGHED.parametrize("stage")
def test_accumulators_take_eight_bytes_an_owned_element(stage: int) -> None:
    outcomes = weights()[stage,]
    total = outcomes[0]["total"]
    assert len(GROUPS) * 1000 < total
    held = [outcome["bytes"][1] for outcome in outcomes]
    assert sum(held) == pytest.approx(BYTES_AN_ELEMENT * total, rel=BYTES_RTOL)
    for outcome, mine in zip(outcomes, held, strict=True):
        assert outcome["bytes"][0] == 0
        if stage == 0:  # every rank steps everything, and measures its share
            assert mine == pytest.approx(BYTES_AN_ELEMENT * total / WORLD, rel=BALANCE_RTOL)
        else:
            assert mine == pytest.approx(BYTES_AN_ELEMENT * outcome["owned"], rel=BYTES_RTOL)


@WEIGHED.parametrize("stage")
def test_accumulators_are_freed(stage: int) -> None:
    for outcome in weights()[stage,]:
        before, during, after = outcome["alive"]
        size = outcome["bytes"][1]
        assert during - before >= (1 - BYTES_RTOL) * size, "the accumulators are visible to the test"
        assert outcome["bytes"][2] == 0
        assert after - before < FREED_SHARE * size
