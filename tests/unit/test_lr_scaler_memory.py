"""What scaling a step holds: nothing of long segments where the optimizer may be stepped on views, else each scaled
element once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mols_ds.core import lr_scaler
from mols_ds.core.layout import ElementLayout
from mols_ds.core.lr_scaler import LRScaler, make_plan
from mols_ds.core.ranges import ShardRange
from tests.helpers.live_bytes import LiveBytes

HEADS, WIDTH, COLUMNS = 48, 4, 64
LAYOUT = ElementLayout(COLUMNS, ((WIDTH, "qk"), (WIDTH, "qk"), (WIDTH, "vo")))  # Megatron's linear_qkv
COLUMN_LAYOUT = ElementLayout(1, ((128, "qk"), (64, "vo")))  # GPT-2's c_attn
START, NUMEL = 5 * COLUMNS + 3, (3 * WIDTH * HEADS - 9) * COLUMNS  # a shard that begins and ends inside of rows
RATES = {"qk": 0.5, "vo": 1.0, "mlp": 3.0}


def step(elementwise: bool, layout: ElementLayout, qk: float = 0.5, steps: int = 3) -> tuple[Tensor, int, int]:
    """(weights, copied elements of the last step, its peak of live bytes) for a tensor of two parameters."""
    torch.manual_seed(0)
    flat = torch.nn.Parameter(torch.randn(NUMEL + 500))
    optimizer = torch.optim.AdamW([flat], lr=1e-2, foreach=False)
    ranges = [ShardRange("qkv", START, 0, NUMEL), ShardRange("mlp", 0, NUMEL, 400)]
    layouts = {"qkv": layout, "mlp": ElementLayout.whole("mlp")}
    plan = make_plan(NUMEL + 500, ranges, layouts, elementwise=elementwise)
    flat.grad = torch.randn_like(flat)
    optimizer.step()
    scaler = LRScaler(
        optimizer, {id(flat): plan}, lambda: RATES | {"qk": qk}, elementwise=elementwise, groups_only=True
    )
    held = 0

    def count(*args: Any) -> None:
        nonlocal held
        held = sum(delta.old.numel() for delta in scaler._deltas)

    optimizer.register_step_pre_hook(count)
    for number in range(steps):
        flat.grad = torch.randn(NUMEL + 500, generator=torch.Generator().manual_seed(number))
        with LiveBytes() as live:
            optimizer.step()
    return flat.detach().clone(), held, live.peak


def expected_held(layout: ElementLayout, group: str) -> int:
    return layout.counts(START, NUMEL)[group]


def test_long_segments_are_stepped_on_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lr_scaler, "LONG_RUN", WIDTH * COLUMNS)
    views, held, live = step(True, LAYOUT)
    assert held == 0
    monkeypatch.setattr(lr_scaler, "LONG_RUN", WIDTH * COLUMNS + 1)
    delta, held, more = step(True, LAYOUT)
    assert held == expected_held(LAYOUT, "qk")
    # torch's own step works on a view at a time: with views it takes less itself.
    assert live + 4 * held <= more
    torch.testing.assert_close(views, delta, rtol=1e-6, atol=1e-7)


def test_columns_are_corrected_in_any_case() -> None:
    assert step(True, COLUMN_LAYOUT)[1] == expected_held(COLUMN_LAYOUT, "qk")


@pytest.mark.parametrize("qk", [0.5, 2.0])
@pytest.mark.parametrize("layout", [LAYOUT, COLUMN_LAYOUT], ids=["rows", "columns"])
def test_each_scaled_element_is_held_once(layout: ElementLayout, qk: float) -> None:
    """The tensor has a range of its own besides the interleaved one: that one was remembered twice."""
    weights, held, _ = step(False, layout, qk)
    assert held == expected_held(layout, "qk") + 400
    views, _, _ = step(True, layout, qk)
    torch.testing.assert_close(weights, views, rtol=1e-6, atol=1e-7)
