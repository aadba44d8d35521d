"""Check an optimizer's weight decay against the catalog, with the real class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mols_ds.optim.traits import unscaled_refusal

LR, DECAY = 1e-2, 0.5
"""Of a weight of 2, a step's decay takes 1e-2 off: as much as Adam's update does."""
Make = Callable[..., torch.optim.Optimizer]
"""(parameters, weight_decay) -> an optimizer of rate LR."""


def check_class(make: Make, keeps: bool) -> None:
    """Two steps with and without decay.

    A class that `keeps` its decay at the base rate takes lr x weight_decay x w off, before the update or after it, and
    nothing else: to lr^2 x weight_decay x 2, what the decay takes off the updates.
    """
    start = torch.randn(6, 5, generator=torch.Generator().manual_seed(4))
    weights: dict[float, Any] = {}
    for decay in (0.0, DECAY):
        weight = torch.nn.Parameter(start.clone())
        optimizer = make([weight], decay)
        refusal = unscaled_refusal(optimizer)
        assert (refusal is None) == (keeps or not decay), refusal
        for seed in range(2):
            weight.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(5 + seed)) * 0.1
            optimizer.step()
        weights[decay] = weight.detach()
    if keeps:
        torch.testing.assert_close(weights[DECAY], weights[0.0] - 2 * LR * DECAY * start, rtol=0, atol=5e-4)
