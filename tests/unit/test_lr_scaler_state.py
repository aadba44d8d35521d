"""Optimizers with odd state or counters; a scaled step leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mols_ds.core.groups import ElementLayout
from mols_ds.core.lr_scaler import LRScaler, make_plan
from mols_ds.core.ranges import ShardRange
from mols_ds.optim.traits import has_shared_counter, is_elementwise
from tests.unit.flat_shard import (
    LR,
    OPTIMIZERS,
    PADDING,
    RATES,
    SIZES,
    STEPS,
    flat_case,
    gradients,
    rate_of_each,
    scaled,
    separate,
    step_all,
)

# ---------------------------------------------------------------------- state in odd shapes


def test_momentum_state_of_none() -> None:
    """torch's SGD wrote None for an untouched buffer in older checkpoints: such a state cannot be sliced."""
    flat, optimizer, _ = scaled(OPTIMIZERS["SGD momentum"])
    optimizer.state[flat]["momentum_buffer"] = None
    step_all(flat, optimizer)
    expected = separate(OPTIMIZERS["SGD momentum"])
    torch.testing.assert_close(flat.detach()[:-PADDING], expected, rtol=0, atol=1e-6)


class SharedCounterAdam(torch.optim.Optimizer):
    """DeepSpeed's FusedAdam without its kernel (deepspeed/ops/adam/fused_adam.py).

    One call a parameter group, whose step counter is `state["step"]` of the last tensor in the list.
    """

    def __init__(self, params: Any, lr: float = LR) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group.setdefault("step", 0)
            state: dict[str, Any] = {}
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"step": group["step"], "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            state["step"] += 1
            for p in group["params"]:
                m, v, t = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"], state["step"]
                m.lerp_(p.grad, 0.1)
                v.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
                p.sub_(group["lr"] * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))


SharedCounterAdam.__name__ = "FusedAdam"
SharedCounterAdam.__module__ = "deepspeed.ops.adam.fused_adam"


@pytest.mark.parametrize("rates_until", [STEPS, 4], ids=["to the end", "then stock again"])
@pytest.mark.parametrize("edges", [(10, 10), (10, 0)], ids=["both mixed", "first mixed"])
def test_shared_step_counter(rates_until: int, edges: tuple[int, int]) -> None:
    """Tensors of two groups: the temporary lists split them, but every element must see the true step.

    edges: where the second group begins in each tensor. At (10, 0) a temporary list ends with a view of the first
    tensor, whose own counter is behind.
    """
    sizes = (24, 30)
    flats = [torch.nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(n))) for n in sizes]
    references = [t.detach().clone().double() for t in flats]
    optimizer = SharedCounterAdam(flats)
    assert is_elementwise(optimizer) and has_shared_counter(optimizer)
    layouts = {"a": ElementLayout.whole("qk"), "b": ElementLayout.whole("mlp")}
    plans = {
        id(flat): make_plan(
            flat.numel(), [ShardRange("a", 0, 0, edge), ShardRange("b", 0, edge, flat.numel() - edge)], layouts
        )
        for flat, edge in zip(flats, edges, strict=True)
    }
    step_rates: dict[str, float] = {}
    LRScaler(optimizer, plans, lambda: step_rates, elementwise=True, shared_counter=True)
    states: list[dict[str, Any]] = [{}, {}]
    for t, gradient in enumerate(gradients(sum(sizes)), start=1):
        step_rates = {"qk": 0.5, "mlp": 2.0} if 2 <= t <= rates_until else {}
        for i, (flat, piece) in enumerate(zip(flats, gradient.split(sizes), strict=True)):
            flat.grad = piece.clone()
            rate = torch.tensor([step_rates.get("qk" if j < edges[i] else "mlp", 1.0) for j in range(flat.numel())])
            s, g = states[i], piece.double()
            s["m"] = 0.9 * s.get("m", 0.0) + 0.1 * g
            s["v"] = 0.999 * s.get("v", 0.0) + 0.001 * g * g
            update = (s["m"] / (1 - 0.9**t)) / ((s["v"] / (1 - 0.999**t)).sqrt() + 1e-8)
            references[i] = references[i] - LR * rate * update
        optimizer.step()
        assert max(optimizer.state[flat]["step"] for flat in flats) == t
        assert optimizer.state[flats[-1]]["step"] == t  # the one that the stock optimizer continues from
    for flat, reference in zip(flats, references, strict=True):
        assert float((flat.detach() - reference).abs().max()) < 2e-6


class GroupCounterSGD(torch.optim.Optimizer):
    """Counts steps in the parameter group, as apex's FusedAdam does; the step shrinks with the count."""

    def __init__(self, params: Any, lr: float = LR) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                self.state[p].setdefault("seen", torch.zeros_like(p)).add_(1)
                p.sub_(group["lr"] / group["step"] * p.grad)


GroupCounterSGD.__name__ = "FusedSGD"
GroupCounterSGD.__module__ = "apex.optimizers.fused_sgd"


def test_group_step_counter() -> None:
    flat, optimizer, scaler = scaled(GroupCounterSGD)
    assert scaler.elementwise
    weight = flat.detach()[:-PADDING].double()
    for t, gradient in enumerate(gradients(weight.numel()), start=1):
        weight = weight - LR / t * rate_of_each() * gradient
    step_all(flat, optimizer)
    assert optimizer.param_groups[0]["step"] == STEPS
    assert float((flat.detach()[:-PADDING] - weight).abs().max()) < 1e-6


# ---------------------------------------------------------------------- what the outside sees


class WholeTensor(torch.optim.SGD):
    """Looks at the whole tensor (its norm), so that it must not be cut."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["norm"] = p.grad.norm()
                p.sub_(group["lr"] * p.grad / p.grad.norm())


def test_whole_tensor_optimizer_goes_by_delta() -> None:
    flat, optimizer, scaler = scaled(lambda p: WholeTensor(p, lr=LR))
    assert not scaler.elementwise  # although a subclass of SGD: it defines its own step
    weight = flat.detach()[:-PADDING].double()
    for gradient in gradients(weight.numel()):
        weight = weight - LR * rate_of_each() * gradient.double() / gradient.double().norm()
    step_all(flat, optimizer)
    assert float((flat.detach()[:-PADDING] - weight).abs().max()) < 2e-6
    assert bool(flat.detach()[-PADDING:].isnan().all())


def test_groups_and_rates_are_restored() -> None:
    """After a step: the very same group objects, base rate, tensors and state keys; hooks gone after remove()."""
    flat, optimizer, scaler = scaled(OPTIMIZERS["AdamW"])
    groups, group = optimizer.param_groups, optimizer.param_groups[0]
    step_all(flat, optimizer)
    assert optimizer.param_groups is groups and optimizer.param_groups[0] is group
    assert group["lr"] == LR and group["params"][0] is flat and len(group["params"]) == 1
    assert list(optimizer.state) == [flat]
    assert int(optimizer.state[flat]["step"]) == STEPS
    scaler.remove()
    before = flat.detach().clone()
    stock = torch.nn.Parameter(before.clone())
    reference = OPTIMIZERS["AdamW"]([stock])
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else both share the moments
    flat.grad = stock.grad = torch.ones_like(flat)
    optimizer.step()
    reference.step()
    assert torch.equal(flat.detach()[:-PADDING], stock.detach()[:-PADDING])


class Explodes(torch.optim.AdamW):
    """Fails in the middle of a step on request."""

    armed = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if self.armed:
            raise RuntimeError("out of memory")
        return torch.optim.AdamW.step(self, closure)


def test_an_exception_inside_of_the_step() -> None:
    """restore() (called by the engine's step in any case) puts everything back; the next step works again."""
    flat, optimizer, scaler = scaled(OPTIMIZERS["AdamW"])
    step_all(flat, optimizer)
    group, kept = optimizer.param_groups[0], list(optimizer.state)
    hook = optimizer.register_step_pre_hook(_raise)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    hook.remove()
    assert optimizer.param_groups[0] is not group  # the temporary groups are still there...
    scaler.restore()
    assert optimizer.param_groups == [group] and list(optimizer.state) == kept and group["lr"] == LR
    before = flat.detach().clone()
    optimizer.step()
    assert not torch.equal(flat.detach()[:-PADDING], before[:-PADDING]) and group["lr"] == LR
    # ... and without restore() the next step begins by putting them back.
    hook = optimizer.register_step_pre_hook(_raise)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    hook.remove()
    optimizer.step()
    assert optimizer.param_groups == [group] and list(optimizer.state) == kept


def _raise(optimizer: Any, args: Any, kwargs: Any) -> None:
    raise RuntimeError("out of memory")


def test_rates_of_one_leave_the_optimizer_alone() -> None:
    """All multipliers 1: not even a temporary group, so the step is stock's bit for bit."""
    flat, optimizer, _ = scaled(OPTIMIZERS["AdamW"], dict.fromkeys(RATES, 1.0))
    seen: list[bool] = []
    groups = optimizer.param_groups
    optimizer.register_step_pre_hook(lambda o, a, k: seen.append(o.param_groups is groups))
    step_all(flat, optimizer)
    stock = torch.nn.Parameter(flat_case()[0].detach().clone())
    step_all(stock, OPTIMIZERS["AdamW"]([stock]))
    assert seen == [True] * STEPS
    assert torch.equal(flat.detach()[:-PADDING], stock.detach()[:-PADDING])


def test_lr_written_between_steps_does_not_compound() -> None:
    flat, optimizer, _ = scaled(OPTIMIZERS["SGD"], {group: 2.0 for group in SIZES})
    flat.data.nan_to_num_(0.0)
    before = flat.detach().clone()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    total = 0.0
    for step in range(4):
        optimizer.param_groups[0]["lr"] = LR * (step + 1)
        total += LR * (step + 1)
        flat.grad = torch.ones_like(flat)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == LR * (step + 1)
    moved = before - flat.detach()
    torch.testing.assert_close(moved[:-PADDING], torch.full_like(moved[:-PADDING], 2 * total), rtol=0, atol=2e-6)
    torch.testing.assert_close(moved[-PADDING:], torch.full_like(moved[-PADDING:], total), rtol=0, atol=2e-6)


def test_a_tensor_without_gradient_or_plan_is_left_alone() -> None:
    flat, pieces, layouts = flat_case()
    idle, stranger = torch.nn.Parameter(torch.ones(sum(SIZES.values()) + PADDING)), torch.nn.Parameter(torch.ones(5))
    optimizer = OPTIMIZERS["AdamW"]([flat, idle, stranger])
    plans = {id(t): make_plan(t.numel(), pieces, layouts) for t in (flat, idle)}
    LRScaler(optimizer, plans, lambda: RATES, elementwise=True)
    for gradient in gradients(sum(SIZES.values())):
        flat.grad = torch.cat([gradient, torch.zeros(PADDING)])
        stranger.grad = torch.ones(5)
        optimizer.step()
    assert torch.equal(idle.detach(), torch.ones_like(idle))
    torch.testing.assert_close(flat.detach()[:-PADDING], separate(OPTIMIZERS["AdamW"]), rtol=0, atol=2e-6)
    assert set(optimizer.state) == {flat, stranger}
