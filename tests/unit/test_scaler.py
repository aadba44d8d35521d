"""Rates per module group on one flat tensor against separate tensors, explicit per-element formulas, and restoring."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mols_ds.groups import ElementLayout
from mols_ds.scaler import MAX_RUNS, Piece, RateScaler, is_elementwise, make_plan

SIZES = {"qk": 37, "mlp": 53, "other": 11, "head": 29}  # odd: views start at unaligned addresses
PADDING = 7
RATES = {"qk": 0.5, "mlp": 2.0, "other": 1.0, "head": 3.0}
STEPS = 6
LR = 1e-2
GRADIENT_SCALE = 0.3

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1, betas=(0.9, 0.95)),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=LR, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=LR, fused=True),
    "Adam L2": lambda p: torch.optim.Adam(p, lr=LR, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=LR),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=LR),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=LR),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=LR, lr_decay=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=LR),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=LR, momentum=0.9, centered=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=LR, weight_decay=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True),
}


def gradients(numel: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(numel, generator=generator) * GRADIENT_SCALE for _ in range(STEPS)]


def flat_case() -> tuple[Tensor, list[Piece], dict[str, ElementLayout]]:
    """A flat shard: one piece a group, then padding that is NaN (as on ZeRO-3)."""
    total = sum(SIZES.values())
    values = torch.randn(total, generator=torch.Generator().manual_seed(0))
    flat = torch.nn.Parameter(torch.cat([values, torch.full((PADDING,), math.nan)]))
    pieces, at = [], 0
    for group, size in SIZES.items():
        pieces.append(Piece(f"w_{group}", 0, at, size))
        at += size
    return flat, pieces, {f"w_{group}": ElementLayout.whole(group) for group in SIZES}


def scaled(
    make: Callable[[Any], torch.optim.Optimizer], rates: dict[str, float] | Callable[[], dict[str, float]] = RATES
) -> tuple[Tensor, torch.optim.Optimizer, RateScaler]:
    flat, pieces, layouts = flat_case()
    optimizer = make([flat])
    plans = {id(flat): make_plan(flat.numel(), pieces, layouts)}
    return flat, optimizer, RateScaler(optimizer, plans, rates if callable(rates) else lambda: rates)


def step_all(flat: Tensor, optimizer: torch.optim.Optimizer) -> None:
    for gradient in gradients(sum(SIZES.values())):
        flat.grad = torch.cat([gradient, torch.zeros(PADDING)])
        optimizer.step()


def separate(make: Callable[[Any], torch.optim.Optimizer], rates: dict[str, float] = RATES) -> Tensor:
    """What an optimizer over one tensor a group, each in a parameter group with its own lr, arrives at."""
    flat, _, _ = flat_case()
    parts = [torch.nn.Parameter(t.clone()) for t in flat.detach()[: -PADDING or None].split(list(SIZES.values()))]
    optimizer = make([{"params": [part], "lr": LR * rates[group]} for group, part in zip(SIZES, parts, strict=True)])
    for gradient in gradients(sum(SIZES.values())):
        for part, piece in zip(parts, gradient.split(list(SIZES.values())), strict=True):
            part.grad = piece.clone()
        optimizer.step()
    return torch.cat([part.detach() for part in parts])


def rate_of_each(rates: dict[str, float] = RATES) -> Tensor:
    return torch.cat([torch.full((size,), rates[group], dtype=torch.float64) for group, size in SIZES.items()])


# ---------------------------------------------------------------------- against separate tensors


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_views_equal_separate_tensors_bit_for_bit(name: str) -> None:
    """The first step has no state to slice and goes by delta: start both from a common step without rates."""
    rates: dict[str, float] = {}
    flat, optimizer, scaler = scaled(OPTIMIZERS[name], lambda: rates)
    assert scaler.elementwise
    parts = [torch.nn.Parameter(t.clone()) for t in flat.detach()[:-PADDING].split(list(SIZES.values()))]
    reference = OPTIMIZERS[name]([{"params": [part]} for part in parts])
    sliced = 0
    for number, gradient in enumerate(gradients(sum(SIZES.values()))):
        if number == 1:
            rates.update(RATES)
            for group, part_group in zip(SIZES, reference.param_groups, strict=True):
                part_group["lr"] = LR * RATES[group]
        flat.grad = torch.cat([gradient, torch.zeros(PADDING)])
        for part, piece in zip(parts, gradient.split(list(SIZES.values())), strict=True):
            part.grad = piece.clone()
        seen: list[int] = []
        hook = optimizer.register_step_pre_hook(lambda o, a, k, seen=seen: seen.append(len(o.param_groups)))
        optimizer.step()
        hook.remove()
        reference.step()
        sliced += seen[0] > 1
    # SGD without momentum keeps no state, so there is nothing to slice: it always goes by delta.
    assert sliced == (0 if name == "SGD" else STEPS - 1)
    expected = torch.cat([part.detach() for part in parts])
    if name == "SGD":
        torch.testing.assert_close(flat.detach()[:-PADDING], expected, rtol=0, atol=2e-6)
    else:
        assert torch.equal(flat.detach()[:-PADDING], expected)
    assert bool(flat.detach()[-PADDING:].isnan().all())  # NaN in, NaN out, and only there
    for key, value in optimizer.state[flat].items():
        if isinstance(value, Tensor) and value.numel() == flat.numel():
            whole = torch.cat([reference.state[part][key].view(-1) for part in parts])
            assert torch.equal(value[:-PADDING], whole), key
        elif isinstance(value, Tensor):
            assert torch.equal(value, reference.state[parts[0]][key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_delta_from_the_first_step(name: str) -> None:
    """A missing state (first step) and every step of an optimizer that is not known to be elementwise go by delta.

    The step is proportional to lr, so only rounding is left: two roundings of a weight of size 3 a step.
    """
    expected = separate(OPTIMIZERS[name])
    for force_delta in (False, True):
        flat, optimizer, scaler = scaled(OPTIMIZERS[name])
        scaler.elementwise = scaler.elementwise and not force_delta
        step_all(flat, optimizer)
        torch.testing.assert_close(flat.detach()[:-PADDING], expected, rtol=0, atol=2e-6)
        moved = (flat.detach() - flat_case()[0].detach())[:-PADDING].abs()
        # Adadelta's steps are tiny by nature; all others move far beyond the tolerance.
        assert float(moved.mean()) > (1e-5 if name == "Adadelta" else 1e-3)


# ---------------------------------------------------------------------- against explicit formulas


def adamw_rule(w: Tensor, g: Tensor, s: dict[str, Any], t: int, lr: Tensor) -> Tensor:
    """Loshchilov and Hutter, algorithm 2."""
    s["m"] = 0.9 * s.get("m", 0.0) + 0.1 * g
    s["v"] = 0.95 * s.get("v", 0.0) + 0.05 * g * g
    update = (s["m"] / (1 - 0.9**t)) / ((s["v"] / (1 - 0.95**t)).sqrt() + 1e-8)
    return w - lr * (update + 0.1 * w)


def sgd_rule(w: Tensor, g: Tensor, s: dict[str, Any], t: int, lr: Tensor) -> Tensor:
    """Nesterov momentum as in torch: the first buffer is the gradient itself."""
    s["b"] = 0.9 * s["b"] + g if "b" in s else g
    return w - lr * (g + 0.9 * s["b"])


def adagrad_rule(w: Tensor, g: Tensor, s: dict[str, Any], t: int, lr: Tensor) -> Tensor:
    s["sum"] = s.get("sum", 0.0) + g * g
    return w - lr / (1 + (t - 1) * 0.01) * g / (s["sum"].sqrt() + 1e-10)


def nadam_rule(w: Tensor, g: Tensor, s: dict[str, Any], t: int, lr: Tensor) -> Tensor:
    """Dozat 2016 with torch's momentum_decay 0.004."""
    mu, after = (0.9 * (1 - 0.5 * 0.96 ** (k * 0.004)) for k in (t, t + 1))
    s["p"] = s.get("p", 1.0) * mu
    s["m"] = 0.9 * s.get("m", 0.0) + 0.1 * g
    s["v"] = 0.999 * s.get("v", 0.0) + 0.001 * g * g
    denominator = (s["v"] / (1 - 0.999**t)).sqrt() + 1e-8
    return w - lr * ((1 - mu) / (1 - s["p"]) * g + after / (1 - s["p"] * after) * s["m"]) / denominator


@pytest.mark.parametrize(
    ("name", "rule"),
    [("AdamW", adamw_rule), ("SGD momentum", sgd_rule), ("Adagrad", adagrad_rule), ("NAdam", nadam_rule)],
)
def test_explicit_formula_with_a_rate_per_element(name: str, rule: Callable[..., Tensor]) -> None:
    """float64 formulas; the optimizer's fp32 rounding over six steps of size 1e-2 stays below 2e-6."""
    flat, optimizer, _ = scaled(OPTIMIZERS[name])
    weight, state = flat.detach()[:-PADDING].double(), {}
    for t, gradient in enumerate(gradients(sum(SIZES.values())), start=1):
        weight = rule(weight, gradient.double(), state, t, LR * rate_of_each())
    step_all(flat, optimizer)
    assert float((flat.detach()[:-PADDING].double() - weight).abs().max()) < 2e-6


# ---------------------------------------------------------------------- fused projections


@pytest.mark.parametrize("rows", [3, 40])
def test_interleaved_ranges(rows: int) -> None:
    """GPT-2's columns (q | k | v in every row): few rows are views, many go by delta with the larger group leading."""
    layout = ElementLayout(1, ((8, "qk"), (4, "vo")))
    start, numel = 5, 12 * rows - 9  # a shard that begins and ends inside of a row
    flat = torch.nn.Parameter(torch.randn(numel, generator=torch.Generator().manual_seed(2)))
    before = flat.detach().clone()
    optimizer = OPTIMIZERS["AdamW"]([flat])
    plan = make_plan(numel, [Piece("c_attn", start, 0, numel)], {"c_attn": layout})
    assert bool(plan.mixed) == (rows > MAX_RUNS)
    rates = {"qk": 0.25, "vo": 4.0}
    RateScaler(optimizer, {id(flat): plan}, lambda: rates)
    each = torch.tensor([rates["qk"] if (start + i) % 12 < 8 else rates["vo"] for i in range(numel)]).double()
    weight, state = before.double(), {}
    for t, gradient in enumerate(gradients(numel), start=1):
        weight = adamw_rule(weight, gradient.double(), state, t, LR * each)
        flat.grad = gradient.clone()
        optimizer.step()
    # Delta magnifies the rounding of w_new (weights up to 4: 2.4e-7) by the ratio of the two rates, at each step.
    magnified = STEPS * 2.4e-7 * rates["vo"] / rates["qk"]
    assert float((flat.detach().double() - weight).abs().max()) < (magnified if plan.mixed else 2e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=6),
    st.integers(0, 20),
)
def test_plan_covers_each_element_once(parts: list[tuple[int, int, int]], tail: int) -> None:
    """Random gaps, lengths and layouts: the runs tile the tensor, and each element has the group of its layout."""
    kinds = [
        ElementLayout.whole("mlp"),
        ElementLayout.whole("other"),
        ElementLayout(1, ((2, "qk"), (1, "vo"))),
        ElementLayout(5, ((1, "qk"), (2, "vo"))),
    ]
    pieces, layouts, truth, at = [], {}, [], 0
    for number, (gap, numel, kind) in enumerate(parts):
        at += gap
        truth += [None] * gap
        name = f"p{number}"
        layouts[name] = kinds[kind]
        if numel:
            pieces.append(Piece(name, 3 * number, at, numel))
        for group, _, length in kinds[kind].runs(3 * number, numel):
            truth += [group] * length
        at += numel
    plan = make_plan(at + tail, list(reversed(pieces)), layouts)
    truth += [None] * tail
    assert [run.lo for run in plan.runs] == [0, *(run.hi for run in plan.runs[:-1])] or not truth
    seen: list[str | None] = [run.group for run in plan.runs for _ in range(run.hi - run.lo)]
    for mixed in plan.mixed:
        inner = [g for g, _, n in mixed.layout.runs(mixed.start, mixed.hi - mixed.lo) for _ in range(n)]
        assert set(seen[mixed.lo : mixed.hi]) == {mixed.lead}
        seen[mixed.lo : mixed.hi] = inner
    assert seen == truth


# ---------------------------------------------------------------------- state in odd shapes


def test_momentum_state_of_none() -> None:
    """torch's SGD wrote None for an untouched buffer in older checkpoints: such a state cannot be sliced."""
    flat, optimizer, _ = scaled(OPTIMIZERS["SGD momentum"])
    optimizer.state[flat]["momentum_buffer"] = None
    step_all(flat, optimizer)
    expected = separate(OPTIMIZERS["SGD momentum"])
    torch.testing.assert_close(flat.detach()[:-PADDING], expected, rtol=0, atol=1e-6)


class SharedCounterAdam(torch.optim.Optimizer):
    """DeepSpeed's FusedAdam without its kernel: one call a parameter group, whose step counter is `state["step"]` of the
    last tensor in the list (deepspeed/ops/adam/fused_adam.py)."""

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
def test_shared_step_counter(rates_until: int) -> None:
    """Two tensors of two groups each: the temporary lists split them, but every element must see the true step."""
    sizes = (24, 30)
    flats = [torch.nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(n))) for n in sizes]
    references = [t.detach().clone().double() for t in flats]
    optimizer = SharedCounterAdam(flats)
    assert is_elementwise(optimizer)
    layouts = {"a": ElementLayout.whole("qk"), "b": ElementLayout.whole("mlp")}
    plans = {
        id(flat): make_plan(flat.numel(), [Piece("a", 0, 0, 10), Piece("b", 0, 10, flat.numel() - 10)], layouts)
        for flat in flats
    }
    step_rates: dict[str, float] = {}
    RateScaler(optimizer, plans, lambda: step_rates)
    states: list[dict[str, Any]] = [{}, {}]
    for t, gradient in enumerate(gradients(sum(sizes)), start=1):
        step_rates = {"qk": 0.5, "mlp": 2.0} if 2 <= t <= rates_until else {}
        for i, (flat, piece) in enumerate(zip(flats, gradient.split(sizes), strict=True)):
            flat.grad = piece.clone()
            rate = torch.tensor([step_rates.get("qk" if j < 10 else "mlp", 1.0) for j in range(flat.numel())])
            s, g = states[i], piece.double()
            s["m"] = 0.9 * s.get("m", 0.0) + 0.1 * g
            s["v"] = 0.999 * s.get("v", 0.0) + 0.001 * g * g
            update = (s["m"] / (1 - 0.9**t)) / ((s["v"] / (1 - 0.999**t)).sqrt() + 1e-8)
            references[i] = references[i] - LR * rate * update
        optimizer.step()
        assert max(optimizer.state[flat]["step"] for flat in flats) == t
        assert optimizer.state[flats[-1]]["step"] == t  # the one that the stock optimizer goes on from
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
    assert not scaler.elementwise  # although a subclass of SGD: it has a step of its own
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
    """Fails in the middle of a step when told so."""

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
    flat, optimizer, scaler = scaled(OPTIMIZERS["AdamW"], dict.fromkeys(RATES, 1.0))
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
    RateScaler(optimizer, plans, lambda: RATES)
    for gradient in gradients(sum(SIZES.values())):
        flat.grad = torch.cat([gradient, torch.zeros(PADDING)])
        stranger.grad = torch.ones(5)
        optimizer.step()
    assert torch.equal(idle.detach(), torch.ones_like(idle))
    torch.testing.assert_close(flat.detach()[:-PADDING], separate(OPTIMIZERS["AdamW"]), rtol=0, atol=2e-6)
    assert set(optimizer.state) == {flat, stranger}
