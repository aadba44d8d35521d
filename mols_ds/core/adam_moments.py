"""Mode "moments": compute each element's gradient mean and variance from Adam's state. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mols_ds.errors import MolsConfigError, MolsUnsupportedError

# Adam's moments cannot resolve the noise of an element whose m^2 is more than 256 times v - m^2, see `adam_moments`.
MOMENTS_CUT = 2.0**-8
FORGOTTEN = 1e-2
"""Where gradients from before a change of the betas weigh less than this in the moments, the change does not matter."""
PIECE = 1 << 20
"""Elements per chunk: about 25 MiB of temporaries."""


def adam_moments(
    exp_avg: Tensor, exp_avg_sq: Tensor, step: int, beta1: float, beta2: float
) -> tuple[Tensor, Tensor, float]:
    """Compute gradient statistics from Adam's m and v after `step` updates.

    For a gradient with constant statistics, the bias-corrected moments satisfy E[m^2] = mu^2 + c s^2 and
    E[v] = mu^2 + s^2. c is the sum of the squared weights of m: c = (1-b1)/(1+b1) * (1+b1^t)/(1-b1^t). So
    s2 = (v - m^2)/(1-c) is unbiased where it is not set to 0. mu2_plain = m^2 still contains c * s2 of noise: its noise
    floor is `NoiseFloor(1, c)`. A constant factor on the gradients (loss scale, sum instead of mean) does not change
    the ratio. Clipping does, because its factor varies.

    s2 is set to 0 in three cases. The element then counts as "constant" and enters no estimator:

    1. v < m^2. m and v average over different windows, so this is common where SNR_i is near 1/(4c) (5 for b1 = 0.9).
       It lowers `mean` and `pooled` of such a group (measured: 0.46 instead of 0.57 for SNR_i from 0 to 4, b1 = 0.8).
       With b1 = 0.9 and SNR_i = 0.3 it affects one element in 400 for b2 = 0.999, none of 400,000 for b2 = 0.95.
    2. v - m^2 < m^2 / 256: rounding dominates. Each update of a moment rounds three times, so fp32 moments have a
       relative error of up to 3 u / (1 - b), u = 2^-24, and v - m^2 an error up to (6 / (1 - b1) + 3 / (1 - b2)) u v.
       The s2 that remain are accurate to 0.2 % for betas (0.9, 0.95) and to 5 % for (0.9, 0.999) in the worst case
       (measured from SSE to AVX-512: 0.02 %). The cut loses no information: at a ratio of 256 (1 - c) the sampling
       error of v - m^2 is 3 (b2 = 0.95) to 7 (0.999) times its expectation. Without a cut, the few elements with
       v - m^2 near 0 would dominate `mean`.
    3. (1 - b2) g^2 is below fp32's normal range (|g| up to 3e-18 for b2 = 0.999): kernels round it coarsely or to 0.
       mu2 is above 0 here.

    Args:
        exp_avg, exp_avg_sq: Adam's m and v: equal shapes, any float dtype; not modified.
        step: optimizer updates in m and v, at least 2.
        beta1, beta2: Adam's betas, in (0, 1).

    Returns:
        (mu2_plain, s2, c). mu2_plain and s2: new tensors of that shape, fp32 (float64 for float64 moments); c: float
        in (0, 1).

    Raises:
        MolsConfigError: a beta outside (0, 1), or step < 2: one gradient has no variance.
    """
    if not 0.0 < beta1 < 1.0 or not 0.0 < beta2 < 1.0:
        raise MolsConfigError(
            f"betas=({beta1}, {beta2}): mode 'moments' needs both betas between 0 and 1; use mode 'probe' or 'online'"
        )
    if step < 2:
        raise MolsConfigError(
            f"step={step}: mode 'moments' needs Adam moments of at least 2 steps; choose a later start"
        )
    power = beta1**step
    c = (1.0 - beta1) / (1.0 + beta1) * (1.0 + power) / (1.0 - power)
    dtype = torch.promote_types(exp_avg.dtype, torch.float32)
    mu2 = (exp_avg.detach().to(dtype) / (1.0 - power)).square_()
    s2 = (exp_avg_sq.detach().to(dtype) / (1.0 - beta2**step)).sub_(mu2)
    lost = (exp_avg_sq < torch.finfo(torch.float32).tiny / (1.0 - beta2)) & ((exp_avg != 0) | (exp_avg_sq != 0))
    mu2.masked_fill_(lost & (mu2 == 0), torch.finfo(dtype).tiny)
    s2.masked_fill_(lost.logical_or_(s2 < MOMENTS_CUT * mu2), 0.0).div_(1.0 - c)
    return mu2, s2, c


def moment_pieces(
    exp_avg: Tensor, exp_avg_sq: Tensor, step: int, beta1: float, beta2: float
) -> Iterator[tuple[int, Tensor, Tensor, float]]:
    """Compute `adam_moments` piece by piece, so that temporary tensors stay small.

    Args:
        exp_avg, exp_avg_sq: Adam's m and v, 1-D fp32 of equal length, biased.
        step: number of updates so far, at least 1.
        beta1, beta2: Adam's betas.

    Yields:
        (offset, mu2_plain, s2, c) of at most `PIECE` elements.
    """
    for at in range(0, exp_avg.numel(), PIECE):
        yield at, *adam_moments(exp_avg[at : at + PIECE], exp_avg_sq[at : at + PIECE], step, beta1, beta2)


MOVING_BETAS = (
    'MoLS does not support mode "moments" with betas that change (a schedule moves them?): keep them (torch: '
    'cycle_momentum=False; DeepSpeed: "cycle_momentum": false), or use "mode": "probe" or "online"'
)


class SteadyBetas:
    """Whether Adam's moments are of one pair of betas, as far back as they remember. A schedule may move the betas, as
    OneCycle schedules do; the weights of the gradients in m and v are not those of `adam_moments` then.

    Only updates of this process count: betas that changed before a checkpoint was loaded are not noticed.
    """

    def __init__(self) -> None:
        self._betas: tuple[float, ...] = ()
        self._changed: int | None = None

    def see(self, groups: Iterable[Mapping[str, Any]], step: int) -> None:
        """Look at the parameter groups of an update; `step`: its number."""
        for group in groups:
            betas = tuple(float(beta) for beta in group.get("betas") or self._betas)
            if self._betas and betas != self._betas:
                self._changed = step
            self._betas = betas

    def steady(self, step: int) -> bool:
        """Return whether the moments after update `step` are of one pair of betas."""
        return self._changed is None or max(self._betas, default=0.0) ** (step - self._changed + 1) < FORGOTTEN


def moments_of(optimizer: Optimizer, tensor: Tensor) -> Mapping[str, Any]:
    """Return the state of a tensor with both of Adam's moments per element.

    Args:
        optimizer: the inner optimizer.
        tensor: one of its parameters or flat shards.

    Returns:
        Its entry of `optimizer.state`; empty if it was never stepped.

    Raises:
        MolsUnsupportedError: another kind of state, from an optimizer class that is not in the catalog.
    """
    state: Mapping[str, Any] = optimizer.state.get(tensor, {})
    if not state.keys() - {"step"}:
        return {}
    for key in ("exp_avg", "exp_avg_sq"):
        if not isinstance(state.get(key), Tensor) or state[key].numel() < tensor.numel():
            raise MolsUnsupportedError(
                f'MoLS does not support mode "moments" with {type(optimizer).__name__}, whose state has no {key} of '
                'each element: use "mode": "probe" or "online"'
            )
    return state
