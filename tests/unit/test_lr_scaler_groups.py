"""Optimizers with more than `param_groups`: lists, tables, tensor counters. Every tensor moves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mols_ds.core.groups import ElementLayout
from mols_ds.core.lr_scaler import LRScaler, make_plan
from mols_ds.core.ranges import ShardRange
from mols_ds.errors import MolsUnsupportedError
from mols_ds.optim.traits import has_shared_counter, is_elementwise, parallel_list, reads_groups_only

RATES = {"embedding": 3.0, "qk": 0.5, "vo": 1.0, "mlp": 1.5}
LR, STEPS = 0.1, 4


class Zipped(torch.optim.Optimizer):
    """Steps as apex/optimizers/fused_adam.py does: zips its groups with a list that it made once. SGD for the update.

    The counter is in the group: a number, or with `capturable` a tensor that is added to in place.
    """

    def __init__(self, params: Any, *, capturable: bool = False, master_weights: bool = False) -> None:
        super().__init__(params, {"lr": LR})
        self.capturable = capturable
        self.param_groups_master = [
            {"params": [p.detach().clone() if master_weights else None for p in group["params"]]}
            for group in self.param_groups
        ]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, group_master in zip(self.param_groups, self.param_groups_master):  # noqa: B905  (as apex does)
            one: Any = torch.ones(1, dtype=torch.int) if self.capturable else 1
            if "step" in group:
                group["step"] += one
            else:
                group["step"] = one
            for p, _ in zip(group["params"], group_master["params"]):  # noqa: B905
                if p.grad is not None:
                    self.state[p].setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                    p.sub_(group["lr"] * p.grad)


def as_class(name: str, module: str, parent: type[Zipped] = Zipped) -> type[Zipped]:
    """The test optimizer as a class of this name from this module."""
    return type(name, (parent,), {"__module__": module, "step": Zipped.step})


APEX = as_class("FusedAdam", "apex.optimizers.fused_adam")
ENGINE_1_9 = as_class("FusedAdam", "transformer_engine.pytorch.optimizers.fused_adam")
UNKNOWN = as_class("Sophia", "elsewhere")


def tensors() -> list[Tensor]:
    """One tensor a module group, with gradients of ones."""
    found = [torch.nn.Parameter(torch.zeros(4)) for _ in RATES]
    for tensor in found:
        tensor.grad = torch.ones(4)
    return found


def scale(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> LRScaler:
    """Scaled as the engines do it."""
    layouts = {group: ElementLayout.whole(group) for group in RATES}
    plans = {id(p): make_plan(4, [ShardRange(group, 0, 0, 4)], layouts) for p, group in zip(params, RATES, strict=True)}
    return LRScaler(
        optimizer,
        plans,
        lambda: RATES,
        elementwise=is_elementwise(optimizer),
        shared_counter=has_shared_counter(optimizer),
        groups_only=reads_groups_only(optimizer),
        parallel_list=parallel_list(optimizer),
    )


@pytest.mark.parametrize("kind", [APEX, ENGINE_1_9, UNKNOWN], ids=["apex", "Transformer Engine 1.9", "unknown"])
@pytest.mark.parametrize("capturable", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("parts", [1, 2], ids=["one group", "two groups"])
def test_every_tensor_is_stepped_and_counted_once(kind: type[Zipped], capturable: bool, parts: int) -> None:
    params = tensors()
    half = len(params) // parts
    optimizer = kind([{"params": params[i : i + half]} for i in range(0, len(params), half)], capturable=capturable)
    masters, groups = optimizer.param_groups_master, optimizer.param_groups
    optimizer.step()  # stock: makes the counter
    counters = [group["step"] for group in groups]
    scale(optimizer, params)
    for _ in range(STEPS - 1):
        optimizer.step()
    for tensor, rate in zip(params, RATES.values(), strict=True):
        expected = -LR * (1 + rate * (STEPS - 1))
        torch.testing.assert_close(tensor.detach(), torch.full((4,), expected), rtol=0, atol=1e-6)
    assert optimizer.param_groups_master is masters and optimizer.param_groups is groups
    assert [int(group["step"]) for group in groups] == [STEPS] * parts
    if capturable:
        assert all(group["step"] is counter for group, counter in zip(groups, counters, strict=True))


def test_a_counter_of_groups_with_gradients_only() -> None:
    """The temporary group that comes first may be one without a gradient: its counter is not the right one."""

    class CountsGradients(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": LR, "step": torch.zeros(1), "seen": []})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                if any(p.grad is not None for p in group["params"]):
                    group["step"] += 1
                    group["seen"].append(len(group["seen"]))

    params = tensors()
    params[0].grad = None
    optimizer = CountsGradients(params)
    scaler = scale(optimizer, params)
    scaler.groups_only = True
    for _ in range(STEPS):
        optimizer.step()
    assert int(optimizer.param_groups[0]["step"]) == STEPS
    assert optimizer.param_groups[0]["seen"] == list(range(STEPS))


def test_a_tensor_for_lr_is_left_as_it_was() -> None:
    params = tensors()
    rate = torch.tensor(LR)
    optimizer = APEX(params)
    optimizer.param_groups[0]["lr"] = rate
    scale(optimizer, params)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(LR)
    torch.testing.assert_close(params[0].detach(), torch.full((4,), -LR * RATES["embedding"]))


@pytest.mark.parametrize("kind", [APEX, ENGINE_1_9])
def test_master_weights_of_the_optimizer_are_refused(kind: type[Zipped]) -> None:
    with pytest.raises(MolsUnsupportedError, match=r"FusedAdam with master_weights=True .* use master_weights=False"):
        parallel_list(kind(tensors(), master_weights=True))


def test_what_sees_temporary_groups() -> None:
    """Classes of the catalog from their own packages, and subclasses that step as they do; nothing else."""
    params = tensors()
    assert reads_groups_only(torch.optim.AdamW(params))
    assert reads_groups_only(type("Mine", (torch.optim.AdamW,), {"__module__": "elsewhere"})(params))
    assert not reads_groups_only(type("Mine", (torch.optim.SGD,), {"step": Zipped.step})(params))
    assert reads_groups_only(APEX(params)) and reads_groups_only(ENGINE_1_9(params))
    assert not reads_groups_only(UNKNOWN(params))
    assert not reads_groups_only(as_class("FusedAdam", "elsewhere")(params))
    assert not reads_groups_only(torch.optim.SparseAdam(params))


def test_bitsandbytes_with_settings_by_index() -> None:
    """Its manager finds the settings of single tensors by the number of their group: temporary groups move them."""
    optimizer: Any = as_class("AdamW8bit", "bitsandbytes.optim.adamw")(tensors())
    optimizer.mng = SimpleNamespace(index2config={}, pid2config={}, module_weight_config_triple=[])
    assert reads_groups_only(optimizer)
    optimizer.mng.index2config[0, 1] = {"optim_bits": 32}
    assert not reads_groups_only(optimizer)


def test_rows_of_several_groups_by_delta_alone() -> None:
    """Segments, interleaved columns and padding of an optimizer that is not known: each element at its own rate."""
    tensor = torch.nn.Parameter(torch.zeros(20))
    tensor.grad = torch.ones(20)
    layouts = {"a": ElementLayout.whole("qk"), "b": ElementLayout.whole("mlp")}
    plan = make_plan(20, [ShardRange("a", 0, 0, 6), ShardRange("b", 0, 6, 10)], layouts)
    optimizer = UNKNOWN([tensor])
    LRScaler(optimizer, {id(tensor): plan}, lambda: RATES, elementwise=False)
    for _ in range(STEPS):
        optimizer.step()
    rates = torch.tensor([RATES["qk"]] * 6 + [RATES["mlp"]] * 10 + [1.0] * 4)
    torch.testing.assert_close(tensor.detach(), -LR * STEPS * rates, rtol=0, atol=1e-6)


def test_a_list_of_another_name() -> None:
    """Nobody knows of it, so that nothing replaces it: the class must not see temporary groups."""

    class Sizes(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": LR})
            self.sizes = [len(group["params"]) for group in self.param_groups]

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group, size in zip(self.param_groups, self.sizes):  # noqa: B905
                for p in group["params"][:size]:
                    p.sub_(group["lr"] * p.grad)

    params = tensors()
    optimizer = Sizes(params)
    scale(optimizer, params)
    optimizer.step()
    for tensor, rate in zip(params, RATES.values(), strict=True):
        torch.testing.assert_close(tensor.detach(), torch.full((4,), -LR * rate))


@pytest.mark.parametrize("kind", [torch.optim.SGD, UNKNOWN])
@pytest.mark.parametrize("before", [True, False], ids=["registered before", "registered after"])
def test_the_users_hooks_see_their_groups_and_the_final_weights(kind: Any, before: bool) -> None:
    """A schedule as a pre-hook and an average of the weights as a post-hook, registered before MoLS or after it."""
    params = tensors()
    optimizer = kind(params) if kind is UNKNOWN else kind(params, lr=LR)
    seen: list[list[Tensor]] = []

    def halve(stepped: torch.optim.Optimizer, *_: object) -> None:
        for group in stepped.param_groups:
            group["lr"] /= 2

    def register() -> None:
        optimizer.register_step_pre_hook(halve)
        optimizer.register_step_post_hook(lambda *_: seen.append([p.detach().clone() for p in params]))

    if before:
        register()
    scaler = scale(optimizer, params)
    if not before:
        register()
    for step in range(1, 4):
        scaler.keep_order()
        optimizer.step()
        assert [group["lr"] for group in optimizer.param_groups] == [LR / 2**step]
        assert all(torch.equal(p, one) for p, one in zip(params, seen[-1], strict=True))


def test_a_tensor_without_elements() -> None:
    params = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.empty(0))]
    optimizer = torch.optim.Adam(params, lr=LR)
    layouts = {"a": ElementLayout.whole("embedding"), "b": ElementLayout.whole("qk")}
    plans = {
        id(p): make_plan(p.numel(), [ShardRange(n, 0, 0, p.numel())], layouts)
        for n, p in zip("ab", params, strict=True)
    }
    LRScaler(optimizer, plans, lambda: RATES, elementwise=True)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert bool((params[0] < 1.0).all())


def test_a_subclass_that_changes_what_a_step_calls_is_not_taken_for_its_parent() -> None:
    class Centred(torch.optim.AdamW):
        def _init_group(self, group: Any, params: Any, grads: Any, *more: Any) -> Any:
            found = super()._init_group(group, params, grads, *more)
            grads[:] = [gradient - gradient.mean() for gradient in grads]
            return found

    class Named(torch.optim.AdamW):
        def __repr__(self) -> str:
            return "Named"

        def of_its_own(self) -> None:
            """Nothing that AdamW calls."""

    assert not is_elementwise(Centred(tensors())) and not reads_groups_only(Centred(tensors()))
    assert is_elementwise(Named(tensors())) and reads_groups_only(Named(tensors()))


@pytest.mark.tier("all")
def test_a_compiled_step_is_scaled_as_any_other() -> None:
    """`torch.compile(optimizer.step)` leaves our hooks out of its graph: rates do not compound, groups are restored."""
    found = []
    for compiled in (False, True):
        weight = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 16))
        optimizer = torch.optim.Adam([weight], lr=LR)
        layouts = {group: ElementLayout.whole(group) for group in RATES}
        parts = [ShardRange(group, 0, 4 * i, 4) for i, group in enumerate(RATES)]
        LRScaler(optimizer, {id(weight): make_plan(16, parts, layouts)}, lambda: RATES, elementwise=True)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for rate in (LR, LR, LR / 2):
            optimizer.param_groups[0]["lr"] = rate
            weight.grad = weight.detach().cos()
            step()
        assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["params"] == [weight]
        found.append(weight.detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
