"""Weights unfrozen or added after attach: the engine's behaviour, and the one warning."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.engines.deepspeed.engines import OFFLOAD, config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.models import PlainLM
from tests.engines.deepspeed.state import full_weights
from tests.helpers.digests import caught
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

WORLD, NAME = 2, "lm_head.weight"
KINDS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "0": (0, "fp32", {}),
    "0 bf16": (0, "bf16", {}),
    "1": (1, "fp32", {}),
    "1 bf16": (1, "bf16", {}),
    "1 bf16 fp32 grads": (1, "bf16 fp32 grads", {}),
    "2": (2, "fp32", {}),
    "2 fp16": (2, "fp16", {}),
    "2 offload": (2, "fp32", OFFLOAD),
    "3": (3, "fp32", {}),
    "3 bf16 offload": (3, "bf16", OFFLOAD),
}
WAYS = ("in the optimizer", "not in the optimizer")
ADDED = ("0", "0 bf16")
"""Elsewhere DeepSpeed has no add_param_group, and fails on its inner optimizer's."""


def train(kind: str, way: str) -> tuple[float, list[str]]:
    """On each rank: how far the weight moves after it was unfrozen, and the messages meanwhile."""
    stage, precision, zero = KINDS[kind]
    torch.manual_seed(0)
    model = PlainLM()
    weight = model.get_parameter(NAME).requires_grad_(False)
    params = [p for p in model.parameters() if p.requires_grad or way == "in the optimizer"]
    section = {"fixed_alphas": {"mlp": 2.0}, "start": 2, "ramp_end": 2}
    made = config(stage, section, precision=precision, zero=zero, micros=1)
    engine = engine_of(made, model, torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0))
    iterate(engine, 0, 1)
    before = full_weights(engine)[NAME]
    with caught() as warned:
        weight.requires_grad_(True)
        if way == "added":
            engine.mols.scaler.optimizer.add_param_group({"params": [weight]})
        for step in range(1, 4):
            iterate(engine, step, 1)
    moved = float((full_weights(engine)[NAME] - before).abs().max())
    engine.destroy()
    return moved, warned


CASES = Cases(
    [*((kind, way) for kind in KINDS for way in WAYS), *((kind, "added") for kind in ADDED)],
    quick=[("0", "in the optimizer"), ("3", "in the optimizer")],
)


@functools.cache
def runs() -> Results:
    return run_cases(train, WORLD, CASES.wanted, timeout=120)


@CASES.parametrize(("kind", "way"))
def test_it_trains_at_the_base_rate_or_not_at_all_and_is_named_once(kind: str, way: str) -> None:
    trains = way == "added" or (kind, way) == ("0", "in the optimizer")
    for moved, warned in runs()[kind, way]:
        assert (moved > 0) is trains
        (line,) = (text for text in warned if NAME in text)
        assert "\n" not in line
        if trains:
            assert "get the base rate and are not measured" in line
        else:
            assert "do not train" in line
        reattach = kind == "0" and trains
        assert ("mols_ds.attach(engine, ...) again" in line) is reattach
        assert reattach or "before the engine is initialized" in line
