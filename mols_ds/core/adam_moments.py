"""Mode "moments": the mean and the variance of each element's gradient out of Adam's own state. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mols_ds.errors import MolsConfigError, MolsUnsupportedError

# Adam's moments do not tell the noise of an element whose m^2 is more than 256 times v - m^2, see `adam_moments`.
MOMENTS_CUT = 2.0**-8
FORGOTTEN = 1e-2
"""Where gradients from before a change of the betas weigh less than this in the moments, the change does not matter."""
PIECE = 1 << 20
"""Elements that are read at a time: about 25 MiB of temporaries."""


def adam_moments(
    exp_avg: Tensor, exp_avg_sq: Tensor, step: int, beta1: float, beta2: float
) -> tuple[Tensor, Tensor, float]:
    """Statistics out of Adam's own moments after `step` updates: (mu2_plain, s2, c).

    With bias-corrected m and v, E[m^2] = mu^2 + c s^2 and E[v] = mu^2 + s^2 for a gradient of constant statistics,
    where c is the sum of the squared weights of m: c = (1-b1)/(1+b1) * (1+b1^t)/(1-b1^t). So s2 = (v - m^2)/(1-c) is
    unbiased where it is not set to 0, and mu2_plain = m^2 still holds c * s2 of noise: its noise floor is
    `NoiseFloor(1, c)`. A factor that is constant over the steps (loss scale, sum instead of mean) does not change the
    ratio; clipping, whose factor varies, does.

    m and v average over different windows, so where SNR_i comes near 1/(4c) (5 for b1 = 0.9), v < m^2 is common. Such
    an element reads s2 = 0, counts as "constant" and is left out, which lowers `mean` and `pooled` of a group of such
    an SNR (0.46 instead of 0.57 was seen for SNR_i from 0 to 4 and b1 = 0.8). With b1 = 0.9 it strikes one element in
    400 at SNR_i = 0.3 and b2 = 0.999, none of 400,000 with b2 = 0.95.

    An element with v - m^2 < m^2 / 256 reads s2 = 0 too, because rounding takes over. Each of a moment's updates rounds
    three times, so fp32 moments are off by up to 3 u / (1 - b) of themselves (u = 2^-24), and v - m^2 by up to
    (6 / (1 - b1) + 3 / (1 - b2)) u v. So each s2 that is kept is known to 0.2 % for betas (0.9, 0.95) and to 5 % for
    (0.9, 0.999), in the worst case (0.02 % was seen from SSE to AVX-512). No knowledge is lost: a ratio at the cut,
    256 (1 - c), is that of an SNR_i at which the sampling error of v - m^2 is 3 (b2 = 0.95) to 7 (0.999) times its
    expectation. And without a cut, `mean` would hang on the few elements with v - m^2 next to 0.

    Adam adds (1 - b2) g^2 to v. Where v is so small that this is below fp32's normal range (|g| of 3e-18 and less for
    b2 = 0.999), kernels round it coarsely or to 0: such an element reads s2 = 0 too, with mu2 above 0.

    Args:
        exp_avg, exp_avg_sq: Adam's m and v, equal shapes, any float dtype; not modified.
        step: number of updates that they hold, at least 2.

    Returns:
        mu2_plain and s2: new tensors of that shape, fp32 (float64 for float64 moments); c: float in (0, 1).

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
    """(offset, mu2_plain, s2, c) of 1-D moments, `PIECE` elements at a time; otherwise as `adam_moments`."""
    for at in range(0, exp_avg.numel(), PIECE):
        yield at, *adam_moments(exp_avg[at : at + PIECE], exp_avg_sq[at : at + PIECE], step, beta1, beta2)


class SteadyBetas:
    """Whether Adam's moments are of one pair of betas, as far back as they remember. A schedule may move the betas, as
    OneCycle schedules do; the weights of the gradients in m and v are not those of `adam_moments` then."""

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

    def check(self, step: int) -> None:
        """Raises MolsUnsupportedError where the moments after update `step` are of several betas."""
        if self._changed is None or max(self._betas, default=0.0) ** (step - self._changed + 1) < FORGOTTEN:
            return
        raise MolsUnsupportedError(
            f'MoLS does not support mode "moments" with betas that change (last in update {self._changed}; a schedule '
            'moves them?): keep them (torch: cycle_momentum=False; DeepSpeed: "cycle_momentum": false), or use "mode": '
            '"probe" or "online"'
        )
