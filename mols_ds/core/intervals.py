"""95 % intervals of a group's value, from the replicates of its sums (`replicates`) or from sample blocks."""

from __future__ import annotations

import math

import torch
from scipy.special import stdtrit
from torch import Tensor

from mols_ds.core.columns import ALL, BETWEEN, BLOCK_COLUMN, CURVE, CURVE_AT, KEPT, PAIR, VALUE, WEIGHT
from mols_ds.core.schema import STEPS, Estimator


def t_quantile(degrees: float) -> float:
    """Return the two-sided 95 % quantile of Student's t for `degrees` degrees of freedom (may be fractional)."""
    return float(stdtrit(degrees, 0.975))


def replicate_interval(
    replicates: Tensor,
    spreads: Tensor,
    plain: float,
    samples: int,
    floor: tuple[float, float],
    estimator: Estimator,
    correction: bool,
) -> tuple[float, float]:
    """Compute the interval of one group.

    The half width is t * sqrt(variance) on a scale where errors are about symmetric: the logarithm of a ratio with its
    noise, and log((d + f) / (1 - d)) of a step d (of d^2 for `step_rms`), where f is about what noise reads.

    Args:
        replicates: (R, len(VALUES)).
        spreads: (SPREADS,), with a positive weight.
        plain: the group's value without the correction for `mean`, `pooled` and `median`; d for `damping`; for
            `step_rms` the mean of d^2, negative or not. The last two as `correction` says.
        samples: K.
        floor: (shrink, floor) of the correction, (1, 0) without one.
        estimator, correction: as in `estimators.estimate`.

    Returns:
        (low, high) of the group's value; (NaN, NaN) where the subsample does not determine it.
    """
    weights = torch.zeros(PAIR, dtype=torch.float64, device="cpu")
    weight = float(spreads[WEIGHT])
    name = {"mean": "snr", "damping": "damping", "step_rms": "step2", "median": "below", "pooled": "mu2"}[estimator]
    weights[VALUE[name + ("_corrected" if correction and name in ("damping", "step2") else "")]] = 1 / weight
    if estimator == "pooled":  # the error of mu2 / s2 is that of mu2 - plain * s2
        weights /= (scale := float(replicates[:, VALUE["s2"]].mean()) / weight)
        weights[VALUE["s2"]] = -plain / (scale * weight)
    error, quantile = _error((replicates @ weights).var().item(), spreads, weights, samples)
    half = quantile * error
    shrink, noise = floor
    if estimator == "median":
        curve = spreads[CURVE_AT:] / weight
        middle = float(curve[CURVE.index(0.0)])
        down, up = (_inverse(curve.tolist(), middle + side * half) for side in (-1, 1))
        return shrink * plain * math.exp(down) - noise, shrink * plain * math.exp(up) - noise
    if estimator in ("mean", "pooled"):
        share = min(half / plain, 700.0) if plain > 0 else 0.0
        return shrink * plain * math.exp(-share) - noise, shrink * plain * math.exp(share) - noise
    offset = 0.0 if not correction else samples**-0.5 if estimator == "damping" else 1 / (samples - 1)
    above, left = plain + offset, 1 - plain
    if above <= 0 or left <= 0:
        return math.nan, math.nan
    share = min(half / above + half / left, 700.0)
    low, high = (
        max(0.0, (above * math.exp(side * share) - offset * left) / (above * math.exp(side * share) + left))
        for side in (-1, 1)
    )
    return (math.sqrt(low), math.sqrt(high)) if estimator == "step_rms" else (low, high)


def _error(total: float, spreads: Tensor, weights: Tensor, samples: int) -> tuple[float, float]:
    """Return (standard error of the group's value, quantile of t).

    The variance between replicates is that of the subsample: what elements share, and what each has alone. Of the
    second, all elements have less than the subsample, in proportion to their number.
    """
    kept, alone, between = (_of_elements(spreads[part], weights) for part in (KEPT, ALL, BETWEEN))
    shared = max(0.0, total - kept)
    own = min(alone, between)
    variance, degrees = shared + own, samples - 1.0
    unknown = shared + max(0.0, kept - alone)
    if variance <= 0:
        return 0.0, 0.0
    # At most twice the degrees: what is shared may be more than these samples show.
    certain = 2.0 if unknown <= 0 else min(2.0, (variance / unknown) ** 2)
    quantile = t_quantile(max(1.0, degrees * certain))
    at_most = max(total, variance)
    if quantile * variance**0.5 > t_quantile(degrees) * at_most**0.5:  # the error of the subsample itself
        return at_most**0.5, t_quantile(degrees)
    return variance**0.5, quantile


def _of_elements(spreads: Tensor, weights: Tensor) -> float:
    product = 2 * weights[VALUE["mu2"]] * weights[VALUE["s2"]]
    return float((spreads[:PAIR] * weights * weights).sum() + product * spreads[PAIR])


def _inverse(curve: list[float], share: float) -> float:
    """Return where the curve has this value, interpolated; its first or last place beyond its ends."""
    if share <= curve[0]:
        return CURVE[0]
    for (left, below), (right, above) in zip(
        zip(CURVE, curve, strict=True), zip(CURVE[1:], curve[1:], strict=False), strict=False
    ):
        if share <= above:
            return left + (right - left) * (share - below) / (above - below)
    return CURVE[-1]


def block_interval(
    blocks: Tensor, value: float, level: float, unit: float, estimator: Estimator, correction: bool, quantile: float
) -> tuple[float, float] | None:
    """Compute the interval of release 0.4.0 from the spread between the blocks of a group.

    mean, pooled: the spread of the blocks' values in relation to their mean, applied to SNR + 1/BLOCK, the expected
    reading of a block. median: that of the logarithm of the blocks' geometric mean. damping: the spread, absolute.

    Args:
        blocks: (B, len(BLOCK_COLUMNS)), at least 2, with counted elements.
        value: of the group.
        level, unit: SNR + 1/BLOCK, and one unit of corrected SNR in `value`.
        quantile: of Student's t for B - 1 degrees of freedom.

    Returns:
        (low, high); None for an estimator that release 0.4.0 did not have.
    """
    if estimator == "step_rms":
        return None
    column = {"mean": "snr", "median": "log_snr", "damping": "damping", "pooled": "mu2"}[estimator]
    column += "_corrected" if correction and estimator in STEPS else ""
    spread = blocks[:, BLOCK_COLUMN[column]] / blocks[:, BLOCK_COLUMN["s2" if estimator == "pooled" else "count"]]
    error = quantile * float(spread.std()) / len(blocks) ** 0.5
    if estimator == "damping":
        return max(0.0, value - error), min(1.0, value + error)
    if estimator == "median":
        down, up = -math.expm1(-error), math.expm1(min(error, 700.0))
    else:
        middle = float(spread.mean())
        down = up = error / middle if middle > 0 else 0.0  # 0 only if every mean is exactly 0
    return value - level * down * unit, value + level * up * unit
