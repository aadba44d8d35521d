"""APOLLO's formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mols_ds.optim import apollo


def test_apollo_projection_keeps_the_expected_gradient() -> None:
    """E[P^T P] = 1: over many draws the mean of P^T P is the identity within five standard errors."""
    draws = [apollo.projection((8, 30), 4, seed, torch.device("cpu"), torch.float32) for seed in range(4000)]
    mean = torch.stack([p.T @ p for p in draws]).mean(0)
    assert draws[0].shape == (4, 8) and torch.equal(
        draws[0], apollo.projection((30, 8), 4, 0, torch.device("cpu"), torch.float32)
    )
    assert float((mean - torch.eye(8)).abs().max()) < 5 * (2 / 4 / 4000) ** 0.5


def test_apollo_with_a_full_rank_rotation_is_adam_by_channels() -> None:
    """First step: Adam's update is a sign, so channel j is scaled to the norm of ones: ||u_j|| = sqrt(rank)."""
    weight = nn.Parameter(torch.zeros(6, 9))
    weight.grad = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) * 3
    keys = {"rank": 6, "update_proj_gap": 1, "scale": 1.0, "scale_type": "channel"}
    optimizer = apollo.Apollo([{"params": [weight], **keys}], lr=1.0, eps=0.0)
    optimizer.step()
    seen = apollo.project(weight.grad, optimizer.state[weight]["projection"])
    expected = -weight.grad * (6**0.5 / seen.norm(dim=0))
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"lr": -1.0},
        {"lr": 1j},
        {"eps": float("nan")},
        {"weight_decay": float("inf")},
        {"betas": (float("nan"), 0.9)},
        {"betas": (0.9, 1.0)},
        {"betas": (0.9,)},
    ],
)
@pytest.mark.parametrize("by_group", [False, True])
def test_apollo_refuses_numbers_that_are_none(options: dict[str, Any], by_group: bool) -> None:
    (key,) = options
    group = {"params": [nn.Parameter(torch.zeros(2))], **(options if by_group else {})}
    with pytest.raises(ValueError, match=rf"APOLLO: {key}="):
        apollo.Apollo([group], **({} if by_group else options))


def test_apollo_refuses_complex_weights() -> None:
    with pytest.raises(ValueError, match="complex weights"):
        apollo.Apollo([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


def test_apollo_limits_growth() -> None:
    update, norm = apollo.limit_growth(torch.full((4,), 10.0), torch.tensor(2.0))
    assert float(norm) == pytest.approx(2.0 * apollo.GROWTH_LIMIT, rel=1e-5) and float(update.norm()) == pytest.approx(
        float(norm)
    )
    kept, _ = apollo.limit_growth(torch.ones(4), torch.tensor(2.0))
    assert torch.equal(kept, torch.ones(4))
