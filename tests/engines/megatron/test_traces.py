"""A probe window leaves no trace of any kind that Megatron's forward and backward passes move."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.engines.megatron import building
from tests.engines.megatron.building import Built, Setup, newest
from tests.engines.megatron.grids import Plan, tiny
from tests.engines.megatron.state import everything
from tests.helpers.digests import caught, differing, digest
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

WORLD = 2
PLAN = Plan(start=2, samples=4, ramp_end=4, updates=5, warmup=2)
NO_EFFECT = {"alpha_min": 1.0, "alpha_max": 1.0}  # so that the updates behind the window are those of stock Megatron
GRIDS: dict[str, Setup] = {
    "experts dp2": tiny(experts=4, balancing=True, distributed=False),
    "experts ep2 bf16": tiny(experts=4, balancing=True, ep=2, dtype="bfloat16"),
    "predictions fp16": tiny(mtp=1, dtype="float16"),
    "pp2 fp16": tiny(pp=2, dtype="float16"),
}
CASES = Cases([(name, way) for name in GRIDS for way in ("stock", "probed")])
PLAIN = (bool, int, float, str, type(None))


def visible(built: Built, chain: Any, scheduler: Any) -> dict[str, Any]:
    """`everything`, every buffer and number of every module, loss scales, sums for logging, other generators."""
    from megatron_patches.trackers import trackers

    seen = everything(built, chain, scheduler)
    for number, chunk in enumerate(built.chunks):
        for path, module in chunk.named_modules():
            for name, value in {**vars(module), **module._buffers}.items():
                key = f"module {number} {path}.{name}"
                if isinstance(value, torch.Tensor) and not value.requires_grad:
                    seen[key] = (digest(value), value.shape, value.dtype)
                elif isinstance(value, PLAIN):
                    seen[key] = repr(value)
    for number, outer in enumerate(chain.chained_optimizers):
        scaler = getattr(outer, "grad_scaler", None)
        seen[f"loss scale {number}"] = repr(scaler and scaler.state_dict())
    for number, sums in enumerate(trackers()):
        for name, entry in sums.items():
            inner = entry.get("values") if isinstance(entry, dict) else getattr(entry, "values", None)
            for value in (entry, inner):
                if isinstance(value, torch.Tensor):
                    seen[f"sum {number} {name}"] = digest(value)
    seen["python's generator"] = digest(torch.tensor(random.getstate()[1]))
    seen["numpy's generator"] = digest(torch.from_numpy(np.random.get_state()[1].astype(np.int64)))
    return seen


def trained(name: str, way: str) -> dict[str, Any]:
    """What is visible after each update, and what moved over the window and in each of its batches."""
    from megatron_patches.cpu.emulation import cpu_megatron
    from megatron_patches.trackers import trackers

    setup = GRIDS[name]
    with cpu_megatron(), caught() as warned:
        building.start(setup)
        for sums in trackers():  # of the case before
            sums.clear()
        built = building.build(setup)
        scaling = dict(initial_loss_scale=2.0**6, loss_scale_window=3)
        chain, scheduler = building.optimizer(built, iterations=PLAN.updates, warmup=PLAN.warmup, **scaling)
        torch.manual_seed(77 + dist.get_rank())
        mols = None if way == "stock" else building.attach(built, chain, scheduler, PLAN.section | NO_EFFECT)
        prints: list[Any] = []
        moved: list[Any] = []
        iteration, before = 0, None
        while len(prints) < PLAN.updates:
            if mols is not None and mols.phase == "calibrating":
                before = before or visible(built, chain, scheduler)
                assert not building.step(built, chain, scheduler, 300 + len(moved)).successful
                moved.append(differing(before, visible(built, chain, scheduler)))
                continue
            assert building.step(built, chain, scheduler, iteration).successful
            iteration += 1
            prints.append(visible(built, chain, scheduler))
    return {"prints": prints, "moved": moved, "warned": warned}


@functools.cache
def runs() -> Results:
    return run_cases(trained, WORLD, CASES.wanted, timeout=60)


def check(stocks: list[Any], probes: list[Any]) -> None:
    for stock, probed in zip(stocks, probes, strict=True):
        assert probed["moved"] == [[]] * PLAN.samples
        for update, (expected, seen) in enumerate(zip(stock["prints"], probed["prints"], strict=True)):
            assert differing(expected, seen) == [], update


@CASES.parametrize("name", GRIDS, reads=lambda name: [(name, "stock"), (name, "probed")])
def test_no_trace(name: str) -> None:
    check(runs()[name, "stock"], runs()[name, "probed"])


@pytest.mark.tier("all")
@pytest.mark.skipif(newest() is None, reason="no newest megatron-core beside the installed one: make setup-dev")
def test_no_trace_of_the_newest_release() -> None:
    names = ("experts ep2 bf16", "predictions fp16")
    cases = [(name, way) for name in names for way in ("stock", "probed")]
    found = run_cases(trained, WORLD, cases, timeout=60, environment={"PYTHONPATH": str(newest())})
    for name in names:
        check(found[name, "stock"], found[name, "probed"])


@CASES.reads(("experts dp2", "stock"))
def test_training_does_move_them() -> None:
    """The comparison is sharp: biases of experts and sums for logging move in each update."""
    first, second = runs()["experts dp2", "stock"][0]["prints"][1:3]
    moved = differing(first, second)
    assert any("expert_bias" in key for key in moved) and any(key.startswith("sum ") for key in moved)
