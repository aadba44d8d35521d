"""Fused projections of many heads under torch's AdamW: views of long rows hold nothing and train the same weights as
delta does, which holds the rows that are not stepped at their rate, each once."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from megatron_patches.cpu.emulation import cpu_megatron
from mols_ds.core import lr_scaler
from tests.engines.megatron import building
from tests.engines.megatron.building import Setup
from tests.helpers.harness import Results, run_cases

pytestmark = [pytest.mark.distributed, pytest.mark.tier("all")]

WORLD, STEPS = 2, 4
FIXED = {"fixed_alphas": {"qk": 0.5, "vo": 1.0, "mlp": 2.0}, "start": 1, "ramp_end": 1}
SETUPS = {
    "DP2": Setup(hidden=64, heads=32, kv_groups=32, overlap=True),
    "TP2": Setup(tp=2, hidden=64, heads=32, kv_groups=32),
}


def counting(scaler: Any, held: list[int]) -> Any:
    """`scaler._delta`, which also adds its copied elements to the last number of `held`."""
    remember = scaler._delta

    def delta(*arguments: Any) -> None:
        known = len(scaler._deltas)
        remember(*arguments)
        held[-1] += sum(one.old.numel() for one in scaler._deltas[known:])

    return delta


def train(name: str, long_run: int) -> dict[str, Any]:
    """Weights after some steps, the copied elements of each scaled step, and those of `linear_qkv` on this rank."""
    setup, lr_scaler.LONG_RUN = SETUPS[name], long_run
    with cpu_megatron():
        building.start(setup)
        built = building.build(setup)
        optimizer, scheduler = building.optimizer(built, init_lr=1e-3)
        mols = building.attach(built, optimizer, scheduler, FIXED)
        held: list[int] = []
        for scaler in mols.scalers:
            scaler.optimizer.register_step_pre_hook(lambda *_: held.append(0))  # before the scaler's own hook
            scaler._delta = counting(scaler, held)
        for iteration in range(STEPS):
            building.step(built, optimizer, scheduler, iteration)
        shards = [shard for part in mols.shards.parts for shard in part.shards]
        fused = [shard for shard in shards if shard.local.name.endswith("linear_qkv.weight")]
        layouts = mols.controller.table.layouts
        rows = sum(layouts[s.range.name].counts(s.range.start, s.range.numel).get("qk", 0) for s in fused)
        cut = any(shard.range.numel < shard.local.parameter.numel() for shard in fused)
        weights = {shard.local.name: shard.tensor.detach().clone() for shard in shards}
        built.config.grad_scale_func = None
    lr_scaler.LONG_RUN = 1 << 18
    return {"weights": weights, "held": held, "qk": rows, "cut": cut, "fused": len(fused)}


@functools.cache
def runs() -> Results:
    return run_cases(train, WORLD, [(name, long) for name in SETUPS for long in (1, 1 << 30)], timeout=120)


@pytest.mark.parametrize("name", SETUPS)
def test_views_hold_nothing_and_train_the_same(name: str) -> None:
    ranks = list(zip(runs()[name, 1], runs()[name, 1 << 30], strict=True))
    assert any(views["fused"] for views, _ in ranks)
    for views, delta in ranks:
        assert views["held"][0] == delta["held"][0] == 0  # the step before the multipliers apply
        assert views["held"][1:] == [0] * (STEPS - 1) and delta["held"][1:] == [delta["qk"]] * (STEPS - 1)
        for key, weight in views["weights"].items():
            torch.testing.assert_close(weight, delta["weights"][key], rtol=2e-6, atol=2e-7)


def test_a_fused_weight_straddles_the_ranks() -> None:
    assert any(rank["cut"] for rank in runs()["DP2", 1])
