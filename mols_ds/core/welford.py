"""One step of Welford's method."""

from __future__ import annotations

import torch
from torch import Tensor


def welford(mean: Tensor, m2: Tensor, value: Tensor, k: int, scratch: Tensor | None = None) -> None:
    """Update mean and M2 in place with one more value per element (Welford 1962): M2 is the sum of squared deviations.

    Args:
        mean, m2: after k - 1 values, equal shapes and float dtypes. Overwritten, not read, for k = 1.
        value: the k-th value, in the same shape and dtype.
        k: number of values with this one, at least 1.
        scratch: work tensor of that shape. May be `value`, which is overwritten then. None: allocates one.
    """
    if k == 1:
        mean.copy_(value)
        m2.zero_()
        return
    delta = torch.sub(value, mean, out=scratch)
    mean.add_(delta, alpha=1.0 / k)
    m2.addcmul_(delta, delta, value=(k - 1) / k)


def squares_of_one(mean: Tensor, m2: Tensor, k: int) -> None:
    """Set M2 for k samples. The last one is g, the others are 0, so mean = g / k and M2 = g^2 (k - 1) / k.

    Args:
        mean: g / k.
        m2: output, in the shape and dtype of `mean`.
        k: number of samples.
    """
    torch.mul(mean, mean, out=m2).mul_(k * (k - 1))
