"""One step of Welford's method."""

from __future__ import annotations

import torch
from torch import Tensor


def welford(mean: Tensor, m2: Tensor, value: Tensor, k: int, scratch: Tensor | None = None) -> None:
    """Update mean and m2 in place with the k-th value (1-based). `scratch` may be `value`, which is overwritten."""
    if k == 1:
        mean.copy_(value)
        m2.zero_()
        return
    delta = torch.sub(value, mean, out=scratch)
    mean.add_(delta, alpha=1.0 / k)
    m2.addcmul_(delta, delta, value=(k - 1) / k)


def squares_of_one(mean: Tensor, m2: Tensor, k: int) -> None:
    """Set M2 of k samples, g the last and 0 the others: mean = g / k, M2 = g^2 (k - 1) / k."""
    torch.mul(mean, mean, out=m2).mul_(k * (k - 1))
