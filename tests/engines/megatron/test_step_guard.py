"""The guard of the first scaled steps on Megatron's optimizers: shards that straddle ranks, parameters of which a rank
has none, and ranks on which nothing goes wrong. The stand-in zips its groups with a list that it made once, as apex's
FusedAdam does, and reads the gradient from where Megatron puts it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from megatron_patches.cpu.emulation import cpu_megatron
from tests.engines.megatron import building
from tests.engines.megatron.building import Setup
from tests.helpers.harness import Results, run_cases

pytestmark = [pytest.mark.distributed, pytest.mark.tier("all")]

WORLD = 2
FIXED = {"fixed_alphas": {"qk": 0.5, "vo": 1.0, "mlp": 2.0, "embedding": 0.25, "head": 3.0}, "start": 1, "ramp_end": 1}
"""From the second step on: the first one leaves optimizer state."""
SETUPS = {"DP2": Setup(mtp=1), "DP2 plain": Setup(distributed=False), "EP2": Setup(ep=2, experts=4), "PP2": Setup(pp=2)}
HOW = ("left out", "left out apart", "known", "known apart", "one rank")


@torch.no_grad()
def zipped_step(self: Any, closure: Any = None) -> None:
    """Of groups beyond those that the list was made for it steps nothing."""
    for group, master in zip(self.param_groups, self.param_groups_master):  # noqa: B905  (as apex does)
        for p, _ in zip(group["params"], master["params"]):  # noqa: B905
            gradient = p.decoupled_grad if self.apart else p.grad
            if gradient is not None:
                self.state[p].setdefault("exp_avg", torch.zeros_like(p)).lerp_(gradient.to(p.dtype), 0.1)
                p.sub_(1e-2 * gradient.to(p.dtype))


def make_zipped(inner: Any, *, apart: bool) -> None:
    """Change the class of Megatron's inner optimizer to the test class; a new optimizer would not take its tensors."""
    inner.__class__ = type("Zipped", (type(inner),), {"step": zipped_step, "__module__": __name__, "apart": apart})
    inner.param_groups_master = [{"params": [None] * len(group["params"])} for group in inner.param_groups]
    inner._patch_step_function()


def move_gradients(outer: Any) -> None:
    """Let `prepare_grads` leave the gradients where precision-aware optimizers have them."""
    prepare = outer.prepare_grads

    def prepared() -> bool:
        found = prepare()
        for group in outer.optimizer.param_groups:
            for p in group["params"]:
                p.decoupled_grad, p.grad = p.grad, None
        return bool(found)

    outer.prepare_grads = prepared


def run(name: str, how: str) -> dict[str, Any]:
    with cpu_megatron():
        return steps(name, how)


def steps(name: str, how: str) -> dict[str, Any]:
    """A step and two scaled ones: a rank's shards, its error, and its tensors that moved."""
    setup, rank = SETUPS[name], torch.distributed.get_rank()
    building.start(setup)
    built = building.build(setup)
    optimizer, scheduler = building.optimizer(built, clip_grad=0.0, init_lr=1e-3)
    for outer in optimizer.chained_optimizers:
        make_zipped(outer.optimizer, apart="apart" in how)
        if "apart" in how:
            move_gradients(outer)
    mols = building.attach(built, optimizer, scheduler, FIXED)
    for scaler in mols.scalers:
        if how.startswith("left out") or (how == "one rank" and rank == 1):
            scaler.groups_only, scaler.parallel_list = True, ""
        elif how == "one rank":
            scaler.groups_only, scaler.parallel_list = True, "param_groups_master"
    shards = [shard for part in mols.shards.parts for shard in part.shards]
    held = {shard.local.name: shard.range.numel for shard in shards}
    parameters = dict(built.chunks[0].module.named_parameters())
    sizes = {shard.local.name: shard.local.parameter.numel() for shard in shards}
    result = {"held": held, "sizes": sizes, "parameters": len(parameters), "error": "", "moved": {}}
    before = [shard.tensor.detach().clone() for shard in shards]
    try:
        for iteration in range(3):
            building.step(built, optimizer, scheduler, iteration)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    result["moved"] = [not torch.equal(shard.tensor, old) for shard, old in zip(shards, before, strict=True)]
    built.config.grad_scale_func = None
    return result


@functools.cache
def runs() -> Results:
    return run_cases(run, WORLD, [(name, how) for name in SETUPS for how in HOW], timeout=120)


def test_shards_straddle_ranks_and_are_empty() -> None:
    """Preconditions: with the distributed optimizer a parameter is split, and a rank has none of some."""
    ranks = runs()["DP2", "known"]
    assert any(rank["held"][name] < rank["sizes"][name] for rank in ranks for name in rank["held"]), "nothing straddles"
    assert all(len(rank["held"]) < rank["parameters"] for rank in ranks), "no rank lacks a parameter"
    for rank in runs()["DP2 plain", "known"]:
        assert rank["held"] == rank["sizes"] and len(rank["held"]) == rank["parameters"]


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("how", ["left out", "left out apart"])
def test_tensors_that_are_left_out_end_the_run_on_every_rank(name: str, how: str) -> None:
    for rank in runs()[name, how]:
        assert rank["error"].startswith("MolsError: ") and "optimizer Zipped left" in rank["error"], rank["error"]


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("how", ["known", "known apart"])
def test_what_is_stepped_right_goes_on(name: str, how: str) -> None:
    for rank in runs()[name, how]:
        assert rank["error"] == "" and all(rank["moved"])


@pytest.mark.parametrize("name", SETUPS)
def test_a_rank_that_sees_nothing_wrong_ends_too(name: str) -> None:
    first, second = runs()[name, "one rank"]
    assert "the optimizer of another rank left out tensors" in first["error"]
    assert "optimizer Zipped left" in second["error"]
