"""Compute signal-to-noise ratios, 95 % intervals and learning-rate multipliers from summed statistics.

Pure functions of `GroupSums`: the same sums give the same bits on every rank.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from mols_ds.core.group_stats import BLOCK_COLUMN, COLUMN, N_BINS, N_EDGES, GroupSums, bin_edge, noise_floor
from mols_ds.core.layout import base_group, is_scaled
from mols_ds.core.schema import STEPS, Estimator
from mols_ds.errors import MolsConfigError, MolsError, MolsWarning

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

# Two-sided 95 % quantiles of Student's t for 1..30 degrees of freedom (NIST/SEMATECH e-Handbook, table 1.3.6.7.2).
_T95 = (
    12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139,
    2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963,
    2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272,
)  # fmt: skip


class Alpha(NamedTuple):
    """A group's multiplier, whether a bound limits it, and its 95 % interval (NaN if unknown)."""

    alpha: float
    clamped: bool
    low: float
    high: float


def estimate(sums: GroupSums, estimator: Estimator, correction: bool) -> dict[str, float]:
    """Compute SNR_m of every group, or its effective signal step d_m in [0, 1] (`STEPS`).

    N is the number of elements with s_i^2 > 0. shrink and floor are `sums.floor`: (K-3)/(K-1) and 1/K for K samples.

      mean     (1/N) sum SNR_i                               corrected: shrink * mean - floor
      median   of SNR_i, exact to a bin of at most 1 %       corrected: shrink * median - floor (monotone in each SNR_i)
      pooled   sum mu_i^2 / sum s_i^2                        corrected: (sum mu_i^2 - floor * sum s_i^2) / sum s_i^2
      damping  (1/N) sum |mu_i| / sqrt(mu_i^2 + s_i^2)       corrected: (1/N) sum sqrt(c_i / (1 + c_i))
                                                             with c_i = max(0, shrink * SNR_i - floor)
      step_rms sqrt((1/N) sum mu_i^2 / (mu_i^2 + s_i^2))     corrected: sqrt(max(0, (1/N) sum (mu_i^2 - floor * s_i^2)
                                                                        / (mu_i^2 + (1 - floor) * s_i^2)))

    Corrected `mean` and `pooled` are unbiased for Gaussian noise. Corrected `median` is biased: the median of a skewed
    distribution is below its mean (pure noise reads -0.5/K). Corrected `damping` has the bias of the clamp of
    each element. Corrected `step_rms` is clamped once per group: the mean of d_i^2 is 0 for noise alone, and otherwise
    too small by a share of about 2 (1 - d_i^2)^2 / K.
    Elements with overflowed or NaN statistics are left out, with a `MolsWarning`.

    Args:
        sums: of all ranks.
        estimator: one of `ESTIMATORS`.
        correction: subtract the noise floor.

    Returns:
        group -> value; NaN for a group with N = 0.

    Raises:
        MolsConfigError: an unknown estimator, or a correction with K <= 3 samples.
    """
    if estimator not in ESTIMATORS:
        raise MolsConfigError(f"estimator={estimator!r} is not known: use one of {', '.join(ESTIMATORS)}")
    shrink, floor = _floor(sums, correction)
    bad = {group: int(n) for group, n in sums.not_finite().items() if n > 0}
    if bad:
        warnings.warn(f"elements with non-finite statistics are left out of the SNR: {bad}", MolsWarning, stacklevel=2)
    result: dict[str, float] = {}
    for row, group in enumerate(sums.groups):
        line = sums.table[row].tolist()
        count = line[COLUMN["count"]]
        if count == 0:
            result[group] = math.nan
        elif estimator == "mean":
            result[group] = shrink * (line[COLUMN["snr"]] / count) - floor
        elif estimator == "median":
            result[group] = shrink * histogram_median(sums.histogram[row]) - floor
        elif estimator == "pooled":
            result[group] = (line[COLUMN["mu2"]] - floor * line[COLUMN["s2"]]) / line[COLUMN["s2"]]
        elif estimator == "step_rms":
            result[group] = math.sqrt(max(0.0, line[COLUMN["step2_corrected" if correction else "step2"]] / count))
        else:
            result[group] = line[COLUMN["damping_corrected" if correction else "damping"]] / count
    return result


def intervals(sums: GroupSums, estimator: Estimator, correction: bool) -> dict[str, tuple[float, float]]:
    """Compute 95 % intervals of `estimate` from the spread between sample blocks.

    Elements of one sample are correlated; samples are independent. So the error comes from B blocks of L consecutive
    samples, each with the estimator's value on every 127th element. The half width is
    t(0.975, B - 1) * spread / sqrt(B), where spread is the standard deviation of

      mean, pooled  the blocks' plain values, relative to their mean. Applied to SNR + 1/L, the expected reading of L
                    samples: that value varies, while a corrected SNR may be near 0.
      median        the logarithm of the blocks' geometric mean (blocks have no histogram): shared noise moves both by
                    the same factor. Applied as a factor on SNR + 1/L.
      damping       the blocks' values, absolute (corrected with the floor of L if K's is): |mu_i|/s_i has an error that
                    falls as 1/sqrt(K) for signal and noise alike.
      step_rms      the blocks' mean squares, absolute.

    Intervals are conservative. Measured on synthetic gradients (K = 32, B = 4, 12,700 elements, up to 81 % of the
    variance shared): 93 to 100 % of the intervals held the estimator's expectation for K samples. Half widths were 1 to
    8 times 1.96 standard deviations with shared noise, and more without: t(0.975, 3) is 3.2, a subsample has more
    element noise, and in pure noise the true error falls as 1/K, this one as 1/sqrt(K L). Intervals cover sampling
    error (in mode "online" also drift within the window), not the bias of `estimate`.

    Returns:
        group -> (low, high); (NaN, NaN) with fewer than 2 blocks.
    """
    value = estimate(sums, estimator, correction)
    result = {group: (math.nan, math.nan) for group in sums.groups}
    for row, group in enumerate(sums.groups):
        table = sums.blocks[:, row]
        table = table[table[:, BLOCK_COLUMN["count"]] > 0]
        blocks = table.shape[0]
        if blocks < 2 or math.isnan(value[group]):
            continue
        spread = _block_values(table, estimator, correction)
        error = t_quantile(blocks - 1) * float(spread.std()) / math.sqrt(blocks)
        if math.isnan(error):  # blocks of release 0.4.0, for an estimator that it did not have
            continue
        if estimator == "damping":
            result[group] = (max(0.0, value[group] - error), min(1.0, value[group] + error))
            continue
        if estimator == "step_rms":
            square = value[group] ** 2
            result[group] = (math.sqrt(max(0.0, square - error)), math.sqrt(min(1.0, square + error)))
            continue
        level, unit = _level(value[group], sums, estimator, correction)
        if estimator == "median":
            down, up = -math.expm1(-error), math.expm1(min(error, 700.0))
        else:
            middle = float(spread.mean())
            down = up = error / middle if middle > 0 else 0.0  # 0 only if every mean is exactly 0
        result[group] = (value[group] - level * down * unit, value[group] + level * up * unit)
    return result


def compute_alphas(
    sums: GroupSums,
    *,
    estimator: Estimator,
    correction: bool,
    reference: str,
    alpha_min: float | None,
    alpha_max: float | None,
) -> tuple[str, dict[str, Alpha]]:
    """Compute every group's multiplier: sqrt(SNR_ref / SNR_m), or d_ref / d_m for `STEPS` (eq. 4 of the paper).

    Alpha is 1 for the reference, for groups that are not scaled (`other`) and for groups with no counted element. A
    value <= 0 means no signal above the noise floor and gives alpha_max, clamped.

    Args:
        sums: of all ranks.
        estimator, correction: as in `estimate`.
        reference: a group of `sums.groups`; or a group type whose layers are groups ("vo" for "vo.0", "vo.1", ...),
            which means their union; or "max", the scaled group with the largest value.
        alpha_min, alpha_max: bounds for all groups but the reference, or None.

    Returns:
        (reference, group -> `Alpha`). `low` and `high` apply after the bounds. They treat both groups' `intervals` as
        independent; shared batch noise makes that too wide, not too narrow.

    Raises:
        MolsConfigError: the reference has no elements; the message names the groups that exist.
        MolsError: the reference's value is <= 0 or NaN, or a group's value is <= 0 without alpha_max.
    """
    values, bounds = estimate(sums, estimator, correction), intervals(sums, estimator, correction)
    name = _largest(values) if reference == "max" else reference
    if name not in values:
        union = _reference_union(sums, name)
        values |= estimate(union, estimator, correction)
        bounds |= intervals(union, estimator, correction)
    elif sums.column("total")[name] == 0:
        raise MolsConfigError(_absent(sums, name))
    if not values[name] > 0:  # NaN included
        raise MolsError(f"reference group {name!r} has no usable SNR ({estimator}: {values[name]:g}): no multipliers")
    power = 1.0 if estimator in STEPS else 0.5
    alphas: dict[str, Alpha] = {}
    for group in sums.groups:
        if group == name or not is_scaled(group) or math.isnan(values[group]):
            alphas[group] = Alpha(1.0, False, 1.0, 1.0)
            continue
        if values[group] <= 0 and alpha_max is None:
            raise MolsError(
                f"group {group!r} has no signal above the noise ({estimator}: {values[group]:g}) and there is no "
                "alpha_max; set alpha_max, take more samples or another estimator"
            )
        raw, *ends = _ratio(values, bounds, name, group, power)
        alpha, low, high = (_bounded(number, alpha_min, alpha_max) for number in (raw, *ends))
        alphas[group] = Alpha(alpha, alpha != raw, low, high)
    return name, alphas


def narrow(alpha: Alpha, rtol: float) -> bool:
    """Return whether half the 95 % interval of a multiplier is at most this share of it."""
    if not (math.isfinite(alpha.low) and math.isfinite(alpha.high)):
        return False
    return (alpha.high - alpha.low) / 2.0 <= rtol * alpha.alpha


def histogram_median(histogram: Tensor) -> float:
    """Compute the median (mean of the two middle values) of a 1-D histogram with `N_BINS` bins, by interpolation.

    The two open bins give their finite edge, 9e-10 or 1e9. NaN for an empty histogram.
    """
    cumulative = histogram.cumsum(0)
    total = int(cumulative[-1])
    if total == 0:
        return math.nan
    return 0.5 * (_ranked(histogram, cumulative, (total - 1) // 2) + _ranked(histogram, cumulative, total // 2))


def t_quantile(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t; Cornish and Fisher's expansion (to 1e-6) above 30 degrees of freedom."""
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z, n = 1.959963984540054, float(degrees)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def _floor(sums: GroupSums, correction: bool) -> tuple[float, float]:
    if not correction:
        return 1.0, 0.0
    if sums.floor.shrink <= 0:
        samples = round(1 / sums.floor.floor)
        raise MolsConfigError(
            f"samples={samples}: noise_floor_correction needs at least 4 samples; raise 'samples' or set it to false"
        )
    return sums.floor


def _level(value: float, sums: GroupSums, estimator: Estimator, correction: bool) -> tuple[float, float]:
    """Return (corrected SNR + 1/L, which a relative error applies to; one unit of corrected SNR in `value`)."""
    shrink, floor = sums.floor
    unit = 1.0 if correction or estimator == "pooled" or shrink <= 0 else 1.0 / shrink
    corrected = value if correction else value / unit - floor
    return max(corrected, 0.0) + noise_floor(sums.block_length).floor, unit


def _block_values(table: Tensor, estimator: Estimator, correction: bool) -> Tensor:
    """Return the value of each block, (B,), from (B, len(BLOCK_COLUMNS)) sums; for "median" the mean logarithm."""
    if estimator == "pooled":
        return table[:, BLOCK_COLUMN["mu2"]] / table[:, BLOCK_COLUMN["s2"]]
    column = {"mean": "snr", "median": "log_snr", "damping": "damping", "step_rms": "step2"}[estimator]
    column += "_corrected" if correction and estimator in STEPS else ""
    return table[:, BLOCK_COLUMN[column]] / table[:, BLOCK_COLUMN["count"]]


def _ratio(
    values: Mapping[str, float], bounds: Mapping[str, tuple[float, float]], reference: str, group: str, power: float
) -> tuple[float, float, float]:
    """Return (value_ref / value_m) ** power and its 95 % interval; adds the errors of the logarithms in quadrature.

    Infinite for value_m <= 0. An end is 0 or infinite where an interval reaches 0.
    """
    low, high = bounds[group]
    ref_low, ref_high = bounds[reference]
    value, ref = values[group], values[reference]
    raw = (ref / value) ** power if value > 0 else math.inf
    if math.isnan(low) or math.isnan(ref_low):
        return raw, math.nan, math.nan
    # No signal: only a lower end is known, from the high end of the group's interval.
    base = raw if value > 0 else (ref / high) ** power if high > 0 else math.inf
    below = math.hypot(_log(ref, ref_low), _log(high, value) if value > 0 else 0.0)
    above = math.hypot(_log(ref_high, ref), _log(value, low) if value > 0 else math.inf)
    return raw, base * math.exp(-power * below) if below < math.inf else 0.0, base * _exp(power * above)


def _log(top: float, bottom: float) -> float:
    """log(top / bottom) for top > 0; infinite for bottom <= 0."""
    return math.log(top / bottom) if bottom > 0 else math.inf


def _exp(value: float) -> float:
    return math.exp(value) if value < 700.0 else math.inf


def _ranked(histogram: Tensor, cumulative: Tensor, rank: int) -> float:
    """Return the element at 0-based `rank` in ascending order, interpolated geometrically inside its bin."""
    index = int(torch.searchsorted(cumulative, cumulative.new_tensor(float(rank)), right=True))
    if index == 0:
        return bin_edge(0)
    if index == N_BINS - 1:
        return bin_edge(N_EDGES - 1)
    inside = (rank + 0.5 - float(cumulative[index - 1])) / float(histogram[index])
    return bin_edge(index - 1 + inside)


def _bounded(alpha: float, low: float | None, high: float | None) -> float:
    if low is not None and alpha < low:
        return low
    return high if high is not None and alpha > high else alpha


def _largest(values: Mapping[str, float]) -> str:
    usable = {group: value for group, value in values.items() if is_scaled(group) and not math.isnan(value)}
    if not usable:
        raise MolsError("reference='max': no scaled group has an element that moved, no multiplier can be computed")
    return max(usable, key=lambda group: usable[group])


def _reference_union(sums: GroupSums, reference: str) -> GroupSums:
    """The sums of all layers of a group type, for a reference that is not a group itself."""
    total = sums.column("total")
    members = [group for group in sums.groups if base_group(group) == reference and total[group] > 0]
    if not members:
        raise MolsConfigError(_absent(sums, reference))
    return sums.combined(members, reference)


def _absent(sums: GroupSums, reference: str) -> str:
    present = [group for group, total in sums.column("total").items() if total > 0 and is_scaled(group)]
    return f"reference={reference!r}: the model has no element in that group; use one of {', '.join(present)} or 'max'"
