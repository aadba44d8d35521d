"""Rates per module group on one flat tensor against separate tensors and explicit per-element formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mols_ds.core.groups import ElementLayout
from mols_ds.core.lr_scaler import MAX_SEGMENTS, LRScaler, make_plan
from mols_ds.core.ranges import ShardRange
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

# ---------------------------------------------------------------------- against separate tensors


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_views_equal_separate_tensors_bit_for_bit(name: str) -> None:
    """The first step has no state to slice and uses delta: start both from a common step without rates."""
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
    # SGD without momentum has no state to slice: it always uses delta.
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

    The step is proportional to lr, so only rounding is left. A weight below 4 is rounded by up to u = 1.2e-7: in each
    of the 6 steps, the first rounding is scaled by a rate of up to 3, one puts the scaled step on the old weight, and
    the expected weight has one of its own: 5 u x 6 = 3.6e-6. Measured: up to 1.4e-6.
    """
    expected = separate(OPTIMIZERS[name])
    for force_delta in (False, True):
        flat, optimizer, scaler = scaled(OPTIMIZERS[name])
        scaler.elementwise = scaler.elementwise and not force_delta
        step_all(flat, optimizer)
        torch.testing.assert_close(flat.detach()[:-PADDING], expected, rtol=0, atol=4e-6)
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
    plan = make_plan(numel, [ShardRange("c_attn", start, 0, numel)], {"c_attn": layout})
    assert bool(plan.interleaved) == (rows > MAX_SEGMENTS)
    rates = {"qk": 0.25, "vo": 4.0}
    LRScaler(optimizer, {id(flat): plan}, lambda: rates, elementwise=True)
    each = torch.tensor([rates["qk"] if (start + i) % 12 < 8 else rates["vo"] for i in range(numel)]).double()
    weight, state = before.double(), {}
    for t, gradient in enumerate(gradients(numel), start=1):
        weight = adamw_rule(weight, gradient.double(), state, t, LR * each)
        flat.grad = gradient.clone()
        optimizer.step()
    # Delta magnifies the rounding of w_new (weights up to 4: 2.4e-7) by the ratio of the two rates, at each step.
    magnified = STEPS * 2.4e-7 * rates["vo"] / rates["qk"]
    assert float((flat.detach().double() - weight).abs().max()) < (magnified if plan.interleaved else 2e-6)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=6),
    st.integers(0, 20),
)
def test_plan_covers_each_element_once(parts: list[tuple[int, int, int]], tail: int) -> None:
    """Random gaps, lengths and layouts: the segments tile the tensor, and each element has the group of its layout."""
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
            pieces.append(ShardRange(name, 3 * number, at, numel))
        for group, _, length in kinds[kind].runs(3 * number, numel):
            truth += [group] * length
        at += numel
    plan = make_plan(at + tail, list(reversed(pieces)), layouts)
    truth += [None] * tail
    segments = plan.segments
    assert [segment.lo for segment in segments] == [0, *(segment.hi for segment in segments[:-1])] or not truth
    interleaved = {mixed.segment.lo for mixed in plan.interleaved}
    seen: list[str | None] = []
    for segment in segments:
        assert len(segment.groups) <= 1 or segment.lo in interleaved
        seen += [segment.groups[0] if segment.groups else None] * (segment.hi - segment.lo)
    for mixed in plan.interleaved:
        lo, hi = mixed.segment.lo, mixed.segment.hi
        seen[lo:hi] = [g for g, _, n in mixed.layout.runs(mixed.start, hi - lo) for _ in range(n)]
    assert seen == truth
