"""The guard of the first scaled steps: faults that it names, and cases that it accepts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mols_ds.core.lr_scaler import LRScaler
from tests.unit.flat_shard import OPTIMIZERS, scaled, step_all
from tests.unit.test_lr_scaler_groups import APEX, LR, UNKNOWN, Zipped, scale, tensors


def watched(optimizer: torch.optim.Optimizer, params: list[Any], *, trusted: bool) -> LRScaler:
    """A watching scaler; `trusted`: as if the catalog listed the class as reading its groups alone."""
    scaler = scale(optimizer, params)
    scaler.watching = True
    if trusted:
        scaler.groups_only, scaler.parallel_list = True, ""
    return scaler


@pytest.mark.parametrize("stock_steps", [0, 2], ids=["without state", "with state"])
def test_tensors_that_a_zip_leaves_out_are_named(stock_steps: int) -> None:
    params = tensors()
    optimizer = UNKNOWN(params)
    for _ in range(stock_steps):
        optimizer.step()
    scaler = watched(optimizer, params, trusted=True)
    optimizer.step()
    assert "optimizer Sophia left out 3 of 4 tensors" in scaler.problem and "use Adam" in scaler.problem


class Decoupled(Zipped):
    """Reads `decoupled_grad`, as Transformer Engine's FusedAdam does under Megatron's precision-aware optimizer."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, master in zip(self.param_groups, self.param_groups_master):  # noqa: B905  (as apex does)
            for p, _ in zip(group["params"], master["params"]):  # noqa: B905
                p.sub_(group["lr"] * p.decoupled_grad)


def decoupled() -> list[Any]:
    params = tensors()
    for p in params:
        p.grad, p.decoupled_grad = None, torch.ones(4, dtype=torch.bfloat16)
    return params


def test_gradients_that_lie_apart_are_watched() -> None:
    params = decoupled()
    scaler = watched(Decoupled(params), params, trusted=True)
    scaler.optimizer.step()
    assert "optimizer Decoupled left out 3 of 4 tensors" in scaler.problem
    params = decoupled()
    scaler = watched(Decoupled(params), params, trusted=False)
    scaler.optimizer.step()
    assert scaler.problem == "" and all(float(p.detach()[0]) != 0.0 for p in params)


def test_the_groups_counter_where_gradients_lie_apart() -> None:
    """Groups without a gradient do not count: the counter comes from the group with gradients."""

    class Counts(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                found = [p for p in group["params"] if getattr(p, "decoupled_grad", None) is not None]
                group["step"] = group.get("step", 0) + bool(found)

    params = tensors()
    for p in params:
        p.grad = None
    params[-1].decoupled_grad = torch.ones(4)
    optimizer = Counts(params, lr=LR)
    scaler = watched(optimizer, params, trusted=True)
    optimizer.step()
    assert scaler.problem == "" and optimizer.param_groups[0]["step"] == 1


class OwnCounter(torch.optim.SGD):
    """One counter for all groups, in the state of each tensor: it advances once for each group."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=LR)
        self.counter = torch.zeros(1)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self.counter += 1
            for p in group["params"]:
                self.state[p]["step"] = self.counter
                p.sub_(group["lr"] * p.grad)


def test_a_counter_that_groups_share_is_named() -> None:
    params = tensors()
    optimizer = OwnCounter(params)
    optimizer.step()
    scaler = watched(optimizer, params, trusted=True)
    optimizer.step()
    assert "optimizer OwnCounter counted one scaled step more than once" in scaler.problem


@pytest.mark.parametrize("kind", [APEX, UNKNOWN])
def test_the_same_classes_as_they_are_scaled_are_fine(kind: type[Zipped]) -> None:
    params = tensors()
    optimizer = kind(params)
    scaler = watched(optimizer, params, trusted=False)
    for _ in range(3):
        optimizer.step()
    assert scaler.problem == ""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torchs_optimizers_on_views_are_fine(name: str) -> None:
    flat, optimizer, scaler = scaled(OPTIMIZERS[name])
    flat.data.nan_to_num_(0.0)
    scaler.watching = True
    step_all(flat, optimizer)
    assert scaler.problem == ""


def test_what_need_not_move() -> None:
    """No gradient, a gradient of zeros, one below the rounding of the weight, and a step that is skipped."""
    params = tensors()
    params[0].grad, params[1].grad = None, torch.zeros(4)
    params[2].data.fill_(1e6)
    params[2].grad = torch.full((4,), 1e-6)
    optimizer = torch.optim.SGD(params, lr=LR)
    scaler = watched(optimizer, params, trusted=False)
    optimizer.step()
    assert scaler.problem == ""

    class Skips(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            """Steps nothing, as a fused optimizer does that found a non-finite gradient."""

    optimizer = Skips(params, lr=LR)
    scaler = watched(optimizer, params, trusted=True)
    optimizer.step()
    assert scaler.problem == ""


def test_a_group_whose_lr_is_0_may_stand_still() -> None:
    class LeavesAlone(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"] if group["lr"] else ():
                    self.state[p].setdefault("sum", torch.zeros_like(p)).add_(p.grad)
                    p.sub_(group["lr"] * p.grad)

    params = tensors()
    optimizer = LeavesAlone([{"params": params[:2]}, {"params": params[2:]}], lr=LR)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    scaler = watched(optimizer, params, trusted=False)
    optimizer.step()
    assert scaler.problem == ""
