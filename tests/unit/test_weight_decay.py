"""Weight decay that is multiplied as the rate is, and decay that stays that of the base rate: plain torch loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mols_ds.core.groups import ElementLayout
from mols_ds.core.lr_scaler import LRScaler, make_plan
from mols_ds.core.ranges import ShardRange
from mols_ds.errors import MolsUnsupportedError
from mols_ds.optim import traits
from mols_ds.optim.adam_mini import ShardedAdamMini
from mols_ds.optim.apollo import Apollo
from mols_ds.optim.lamb import ShardedLamb
from mols_ds.optim.sgg import SGG
from tests.helpers.decays import DECAY, LR, Make, check_class
from tests.helpers.optimizer_facts import stand_in
from tests.unit.flat_shard import PADDING, SIZES, STEPS, flat_case, gradients

DECOUPLED: dict[str, Make] = {
    "AdamW": lambda p, wd: torch.optim.AdamW(p, lr=LR, weight_decay=wd),
    "AdamW fused": lambda p, wd: torch.optim.AdamW(p, lr=LR, weight_decay=wd, fused=True),
    "Adam": lambda p, wd: torch.optim.Adam(p, lr=LR, weight_decay=wd, decoupled_weight_decay=True),
    "NAdam": lambda p, wd: torch.optim.NAdam(p, lr=LR, weight_decay=wd, decoupled_weight_decay=True),
}
WAYS: dict[str, dict[str, Any]] = {
    "temporary groups": {"elementwise": True},
    "delta": {"elementwise": False, "groups_only": True},
    "own step": {"elementwise": False, "groups_only": False},
}


def moving(step: int) -> dict[str, float]:
    """Multipliers that change from step to step, as on a ramp."""
    share = (step + 1) / STEPS
    return {"qk": 1 - 0.7 * share, "mlp": 1 + 3.5 * share, "other": 1.0, "head": 1 + share}


def expected(make: Make, scaled: bool) -> Tensor:
    """One tensor a group. Its decay is written out; the optimizer has none and lr x multiplier."""
    parts = [torch.nn.Parameter(t.clone()) for t in flat_case()[0].detach()[:-PADDING].split(list(SIZES.values()))]
    optimizer = make([{"params": [part]} for part in parts], 0.0)
    for step, gradient in enumerate(gradients(sum(SIZES.values()))):
        rates = moving(step)
        for name, part, piece, group in zip(
            SIZES, parts, gradient.split(list(SIZES.values())), optimizer.param_groups, strict=True
        ):
            part.grad, group["lr"] = piece.clone(), LR * rates[name]
            with torch.no_grad():
                part.mul_(1 - LR * DECAY * (rates[name] if scaled else 1.0))
        optimizer.step()
    return torch.cat([part.detach() for part in parts])


def run(make: Make, way: str, value: str) -> tuple[Tensor, torch.optim.Optimizer]:
    """The same on one flat tensor through the scaler."""
    flat, pieces, layouts = flat_case()
    optimizer, at = make([flat], DECAY), [0]
    plans = {id(flat): make_plan(flat.numel(), pieces, layouts)}
    unscaled = traits.unscaled_decay(optimizer, value)
    LRScaler(optimizer, plans, lambda: moving(at[0]), unscaled_decay=unscaled, **WAYS[way])
    for gradient in gradients(sum(SIZES.values())):
        flat.grad = torch.cat([gradient, torch.zeros(PADDING)])
        optimizer.step()
        at[0] += 1
        (group,) = optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (LR, DECAY), "the user's own settings are put back"
    return flat.detach()[:-PADDING], optimizer


@pytest.mark.parametrize("name", DECOUPLED)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", ["scaled", "unscaled"])
def test_both_values_equal_a_loop_that_writes_the_decay_out(name: str, way: str, value: str) -> None:
    """Rounding as in test_lr_scaler.py: 5 u in each of 6 steps for weights below 4, magnified by up to 4.5 of delta."""
    found, _ = run(DECOUPLED[name], way, value)
    expectation = expected(DECOUPLED[name], value == "scaled")
    torch.testing.assert_close(found, expectation, rtol=0, atol=8e-6)
    other = expected(DECOUPLED[name], value != "scaled")
    assert float((found - other).abs().max()) > 1e-2, "the two values differ far beyond the tolerance"


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("value", ["scaled", "unscaled"])
def test_interleaved_groups(rows: int, value: str) -> None:
    """GPT-2's columns: few rows are views, many go by delta with the larger multiplier leading."""
    layout, rates, numel = ElementLayout(1, ((8, "qk"), (4, "vo"))), {"qk": 0.5, "vo": 2.0}, 12 * rows
    flat = torch.nn.Parameter(torch.randn(numel, generator=torch.Generator().manual_seed(2)))
    each = torch.tensor([rates["qk"] if i % 12 < 8 else rates["vo"] for i in range(numel)])
    own = [torch.nn.Parameter(flat.detach()[each == rate].clone()) for rate in rates.values()]
    plain = DECOUPLED["AdamW"](
        [{"params": [w], "lr": LR * rate} for w, rate in zip(own, rates.values(), strict=True)], 0.0
    )
    optimizer = DECOUPLED["AdamW"]([flat], DECAY)
    plan = make_plan(numel, [ShardRange("c_attn", 0, 0, numel)], {"c_attn": layout})
    unscaled = traits.unscaled_decay(optimizer, value)
    LRScaler(optimizer, {id(flat): plan}, lambda: rates, elementwise=True, unscaled_decay=unscaled)
    for gradient in gradients(numel):
        flat.grad = gradient.clone()
        optimizer.step()
        for w, rate in zip(own, rates.values(), strict=True):
            w.grad = gradient[each == rate].clone()
            w.data.mul_(1 - LR * DECAY * (rate if value == "scaled" else 1.0))
        plain.step()
    for w, rate in zip(own, rates.values(), strict=True):
        torch.testing.assert_close(flat.detach()[each == rate], w.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_without_a_gradient_does_not_decay(way: str) -> None:
    flat, pieces, layouts = flat_case()
    before, optimizer = flat.detach().clone(), DECOUPLED["AdamW"]([flat], DECAY)
    plans = {id(flat): make_plan(flat.numel(), pieces, layouts)}
    LRScaler(optimizer, plans, lambda: moving(3), unscaled_decay=lambda: None, **WAYS[way])
    optimizer.step()
    assert torch.equal(flat.detach()[:-PADDING], before[:-PADDING])


# ---------------------------------------------------------------------- facts of the catalog about each class

REAL: dict[str, tuple[Make, bool]] = {
    **{name: (make, True) for name, make in DECOUPLED.items()},
    "Adam, L2": (lambda p, wd: torch.optim.Adam(p, lr=LR, weight_decay=wd), False),
    "NAdam, L2": (lambda p, wd: torch.optim.NAdam(p, lr=LR, weight_decay=wd), False),
    "RAdam": (lambda p, wd: torch.optim.RAdam(p, lr=LR, weight_decay=wd, decoupled_weight_decay=True), True),
    "RAdam, L2": (lambda p, wd: torch.optim.RAdam(p, lr=LR, weight_decay=wd), False),
    "Adamax": (lambda p, wd: torch.optim.Adamax(p, lr=LR, weight_decay=wd), False),
    "Adagrad": (lambda p, wd: torch.optim.Adagrad(p, lr=LR, weight_decay=wd), False),
    "Adadelta": (lambda p, wd: torch.optim.Adadelta(p, lr=LR, weight_decay=wd), False),
    "RMSprop": (lambda p, wd: torch.optim.RMSprop(p, lr=LR, weight_decay=wd), False),
    "SGD": (lambda p, wd: torch.optim.SGD(p, lr=LR, momentum=0.9, weight_decay=wd), False),
    "Muon": (lambda p, wd: torch.optim.Muon(p, lr=LR, weight_decay=wd), False),
    "ShardedLamb": (lambda p, wd: ShardedLamb(p, lr=LR, weight_decay=wd), False),
    "ShardedAdamMini": (lambda p, wd: ShardedAdamMini(p, lr=LR, weight_decay=wd), True),
    "SGG": (lambda p, wd: SGG(p, lr=LR, weight_decay=wd), True),
    "Apollo": (lambda p, wd: Apollo(p, lr=LR, weight_decay=wd), True),
}
"""Real classes, and whether their decay can stay that of the base rate."""


@pytest.mark.parametrize("name", REAL)
def test_real_classes(name: str) -> None:
    """Those of pytorch-optimizer: tests/engines/transformers/test_optimizer_classes.py."""
    check_class(*REAL[name])


@pytest.mark.parametrize(
    ("name", "package", "group", "keeps"),
    [
        ("FusedAdam", "deepspeed", {"adam_w_mode": 1}, True),
        ("FusedAdam", "apex", {"adam_w_mode": 0}, False),
        ("FusedAdam", "transformer_engine", {"adam_w_mode": 1}, True),
        ("FusedAdam", "elsewhere", {"adam_w_mode": 1}, False),
        ("DeepSpeedCPUAdam", "deepspeed", {"adam_w_mode": True}, True),
        ("DeepSpeedCPUAdam", "deepspeed", {"adam_w_mode": False}, False),
        ("FusedAdagrad", "apex", {"adagrad_w_mode": 1}, True),
        ("FusedAdagrad", "apex", {"adagrad_w_mode": 0}, False),
        ("DeepSpeedCPUAdagrad", "deepspeed", {}, False),
        ("FusedLion", "deepspeed", {}, True),
        ("DeepSpeedCPULion", "deepspeed", {}, True),
        ("FusedSGD", "apex", {}, False),
        ("FusedSGD", "transformer_engine", {}, False),
        ("AdamW8bit", "bitsandbytes", {}, True),
        ("Sophia", "elsewhere", {}, False),
    ],
)
def test_classes_that_need_a_device(name: str, package: str, group: dict[str, Any], keeps: bool) -> None:
    """The mode is an attribute of these classes."""
    optimizer = stand_in(name, package, weight_decay=0.1)
    for key, value in group.items():
        setattr(optimizer, key, value)
    assert (traits.unscaled_refusal(optimizer) is None) == keeps
    optimizer.param_groups[0]["weight_decay"] = 0.0
    assert traits.unscaled_refusal(optimizer) is None, "nothing decays"


def test_the_refusal_names_the_optimizer_and_the_way_out_and_comes_later_too() -> None:
    flat, pieces, layouts = flat_case()
    optimizer = torch.optim.SGD([flat], lr=LR, weight_decay=0.0)
    unscaled = traits.unscaled_decay(optimizer, "unscaled")
    plans = {id(flat): make_plan(flat.numel(), pieces, layouts)}
    LRScaler(optimizer, plans, lambda: moving(3), elementwise=True, unscaled_decay=unscaled)
    flat.grad = torch.ones_like(flat)
    optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.1  # a schedule of the decay, as Megatron's
    with pytest.raises(MolsUnsupportedError, match=r'"unscaled" with SGD .*gradient.*"scaled"') as caught:
        optimizer.step()
    assert "\n" not in str(caught.value)


def test_a_subclass_with_a_step_of_its_own_is_not_known() -> None:
    class Mine(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Inherits(torch.optim.AdamW):
        pass

    weight = torch.nn.Parameter(torch.ones(2))
    assert traits.unscaled_refusal(Mine([weight])) is not None
    assert traits.unscaled_refusal(Inherits([weight])) is None
