"""A probe window leaves no trace: bit for bit the engine that never probed, with dropout active, in every layout."""

from __future__ import annotations

import functools
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

from tests.engines.deepspeed.engines import LR, OFFLOAD, OFFLOAD_ALL, config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.models import model_of
from tests.engines.deepspeed.state import snapshot
from tests.helpers.digests import digest
from tests.helpers.harness import Results, run_cases
from tests.helpers.oracle.models import groups_of
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

WORLD, SAMPLES, START, STEPS = 2, 4, 2, 5
DROPOUT = 0.1
# Alphas of exactly 1, so that the later steps must be those of a stock engine.
NO_EFFECT = {"mode": "probe", "samples": SAMPLES, "start": START, "ramp_end": 4, "alpha_min": 1.0, "alpha_max": 1.0}

CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "0 fp32": (0, "fp32", {}),
    "0 bf16": (0, "bf16", {}),
    "0 fp16": (0, "fp16", {}),
    "1 fp32": (1, "fp32", {}),
    "1 bf16": (1, "bf16", {}),
    "1 BF16_Optimizer": (1, "bf16 fp32 grads", {}),
    "1 offload": (1, "fp32", OFFLOAD),
    "2 fp32": (2, "fp32", {}),
    "2 bf16": (2, "bf16", {}),
    "2 fp16": (2, "fp16", {}),
    "2 round robin": (2, "bf16", {"round_robin_gradients": True}),
    "2 overlap": (2, "fp32", {"overlap_comm": True}),
    "2 not contiguous, small buckets": (2, "fp32", {"contiguous_gradients": False, "reduce_bucket_size": 700}),
    "2 all-reduce": (2, "fp32", {"reduce_scatter": False}),
    "2 offload": (2, "fp32", OFFLOAD),
    "2 offload fp16": (2, "fp16", OFFLOAD),
    "3 fp32": (3, "fp32", {}),
    "3 bf16": (3, "bf16", {}),
    "3 fp16": (3, "fp16", {}),
    "3 nothing persistent": (3, "fp32", {"stage3_param_persistence_threshold": 0, "sub_group_size": 700}),
    "3 all persistent": (3, "fp32", {"stage3_param_persistence_threshold": 10**6}),
    "3 offload": (3, "bf16", OFFLOAD),
    "3 offload all": (3, "fp32", OFFLOAD_ALL),
    "3 offload fp16": (3, "fp16", OFFLOAD),
}
PLAIN = ("1 micro-batch", "no clipping", "attached at step 0", "recalibrated")
NAMES = Cases(
    [*CASES, *PLAIN],
    quick=["0 fp32", "1 BF16_Optimizer", "2 fp16", "3 fp32", "3 offload all", "recalibrated"],
    full=["1 fp32", "1 bf16", "1 offload", "2 fp32", "2 offload fp16", "3 bf16", "3 fp16", "3 all persistent"],
)
LAYOUTS = {0: "FP16_UnfusedOptimizer", 1: "DeepSpeedZeroOptimizer", 2: "DeepSpeedZeroOptimizer"}
LAYOUTS |= {3: "DeepSpeedZeroOptimizer_Stage3"}
ODD_LAYOUTS = {"0 fp32": "AdamW", "1 BF16_Optimizer": "BF16_Optimizer"}


def engine_in(case: str, probing: bool, micros: int, **section: Any) -> Any:
    stage, precision, zero = CASES.get(case, (3, "fp32", {}))
    scheduler = {"type": "WarmupCosineLR", "params": {"total_num_steps": 50, "warmup_num_steps": 5}}
    clip = {"gradient_clipping": 0.0} if case == "no clipping" else {}
    mols = {**NO_EFFECT, **section} if probing else None
    settings = config(stage, mols, precision=precision, zero=zero, micros=micros, scheduler=scheduler, **clip)
    model = model_of("gpt2", dropout=DROPOUT)
    optimizer = torch.optim.AdamW(groups_of(model, LR, 2 * LR, 0.1))
    engine = engine_of(settings, model, optimizer, initialize=None if probing else deepspeed.initialize)
    torch.manual_seed(77 + dist.get_rank())  # dropout differs by rank
    return engine


def train(case: str, probing: bool, *, forget: bool = False) -> dict[str, Any]:
    """STEPS steps; snapshots after each, and around and inside of the probe windows."""
    micros = 1 if case == "1 micro-batch" else 2
    section: dict[str, Any] = {"start": 0} if case == "attached at step 0" else {}
    if case == "recalibrated":
        section = {"recalibrate": {"every": 2}}
    engine = engine_in(case, probing, micros, **section)
    if forget:
        engine.mols.window.open_pass = lambda: None
    result: dict[str, Any] = {"steps": [], "windows": [], "samples": []}
    probes, before, inside = 0, None, []
    while engine.global_steps < STEPS:
        if probing and engine.mols.phase == "calibrating":
            before = before or snapshot(engine)
            assert engine.mols.samples == probes % SAMPLES
            iterate(engine, 300 + probes, micros)
            probes += 1
            after, window = snapshot(engine), engine.mols.window.state_dict()
            inside.append(window and digest(window["stream"][0]))
            if engine.mols.phase != "calibrating":
                result["windows"].append((before, after, inside))
                result["samples"].append(engine.mols.samples)
                before, inside = None, []
            continue
        iterate(engine, engine.global_steps, micros)
        result["steps"].append(snapshot(engine))
    result["layout"] = type(engine.optimizer).__name__
    result["alphas"] = engine.mols.alphas if probing else {}
    result["bytes"] = engine.mols.accumulator_bytes if probing else 0
    engine.destroy()
    return result


@functools.cache
def runs() -> Results:
    cases = [(name, probing) for name in NAMES.wanted for probing in (False, True)]
    return run_cases(train, WORLD, cases, timeout=60)


@functools.cache
def forgetful() -> Results:
    return run_cases(train_forgetful, WORLD, [("0 fp32",)], timeout=60)


def train_forgetful(case: str) -> dict[str, Any]:
    return train(case, True, forget=True)


@NAMES.parametrize("case")
def test_no_trace(case: str) -> None:
    for stock, probed in zip(runs()[case, False], runs()[case, True], strict=True):
        assert probed["samples"] == [SAMPLES] * len(probed["windows"]) and probed["windows"]
        assert set(probed["alphas"].values()) == {1.0} and probed["bytes"] == 0
        for before, after, inside in probed["windows"]:
            assert [key for key in before if before[key] != after[key]] == []
            # the window drew separate random numbers, different for each sample
            assert inside[-1] is None and len({*inside, before["random"]}) == SAMPLES + 1
        assert len(stock["steps"]) == len(probed["steps"]) == STEPS
        for step, (expected, seen) in enumerate(zip(stock["steps"], probed["steps"], strict=True)):
            assert [key for key in expected if expected[key] != seen.get(key)] == [], step
            assert seen.keys() == expected.keys()
        assert len({step["random"] for step in stock["steps"]}) == STEPS  # dropout was active in training


@NAMES.parametrize("case", CASES)
def test_the_cases_are_what_they_say(case: str) -> None:
    """The layouts that were meant were run, and the dynamic loss scale did grow during the run."""
    stage = CASES[case][0]
    assert runs()[case, True][0]["layout"] == ODD_LAYOUTS.get(case, LAYOUTS[stage])
    if case in ("0 fp16", "2 fp16", "2 offload fp16", "3 fp16"):
        key = "loss_scale_config" if stage == 0 else "loss_scaler"
        assert len({step[key] for step in runs()[case, False][0]["steps"]}) > 1


@NAMES.reads("recalibrated")
def test_a_recalibration_has_a_window_of_its_own() -> None:
    assert len(runs()["recalibrated", True][0]["windows"]) == 2


@NAMES.reads("0 fp32")
def test_a_forgotten_random_state_would_be_seen() -> None:
    """The comparison is sharp: without putting the random state back, dropout and hence the weights differ."""
    stock, probed = runs()["0 fp32", False][0]["steps"], forgetful()["0 fp32",][0]["steps"]
    assert stock[START - 1] == probed[START - 1]
    assert any(stock[-1][key] != probed[-1][key] for key in stock[-1] if key.startswith("weight"))
