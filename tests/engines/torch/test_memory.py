"""Memory that MoLS takes besides the accumulators, as torch's operations count it: a few chunks in a sample, nothing
in a scaled step of the optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mols_ds
from mols_ds.core.accumulators import CPU_CHUNK
from mols_ds.core.subsample import ELEMENTS
from tests.helpers.live_bytes import LiveBytes

WIDTH = 2048
SECTION = {"start": 1, "samples": 4, "ramp_end": 5, "noise_floor_correction": False}


class Wide(nn.Module):
    """One matrix, applied to a few vectors: next to no activations."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v_proj(self.up_proj(x)).square().mean()


def peaks(section: dict[str, Any] | None) -> list[int]:
    """Most bytes at a time in the optimizer's calls of `step`."""
    torch.manual_seed(0)
    model, found = Wide(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    if section is not None:
        mols_ds.attach(optimizer, model, section, total_steps=9)
    for _ in range(9):
        model(torch.randn(4, WIDTH)).backward()
        with LiveBytes() as live:
            optimizer.step()
        found.append(live.peak)
        optimizer.zero_grad()
    return found


@pytest.mark.tier("all")
def test_a_sample_takes_chunks_and_a_scaled_step_nothing() -> None:
    """The first sample makes the accumulators. Of `stock`, all but the first step are alike: it makes Adam's state."""
    stock = peaks(None)[-1]
    probe, online = (peaks({**SECTION, "mode": mode}) for mode in ("probe", "online"))
    assert max(probe[2:5]) < 32 * CPU_CHUNK < WIDTH**2 * 4  # 8 MiB, of a gradient of 16 MiB
    assert max(online[2:5]) < stock + 4 * ELEMENTS + 1024  # a sample's elements that the intervals keep
    for scaled in (probe[5:], online[5:]):
        assert max(scaled) < stock + 1024
