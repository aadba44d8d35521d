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

from mols_ds.core.columns import BLOCK, BLOCK_COLUMN, WEIGHT
from mols_ds.core.group_stats import COLUMN, N_BINS, N_EDGES, GroupSums, bin_edge
from mols_ds.core.intervals import block_interval, replicate_interval, t_quantile
from mols_ds.core.layout import base_group, is_scaled
from mols_ds.core.schema import STEPS, Estimator
from mols_ds.errors import MolsConfigError, MolsError, MolsWarning

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)


class Alpha(NamedTuple):
    """A group's multiplier, whether a bound limits it, and its 95 % interval (NaN if unknown)."""

    alpha: float
    clamped: bool
    low: float
    high: float

    def times(self, factor: float) -> Alpha:
        """Return the multiplier and its interval times a constant."""
        return Alpha(self.alpha * factor, self.clamped, self.low * factor, self.high * factor)


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
    """Compute 95 % intervals of `estimate`, from replicates or, for samples that release 0.4.0 began, from its blocks.

    They cover the error from K samples at these weights: the value that `estimate` has on average over other samples.
    They do not cover its bias, nor drift. Coverage: docs/evidence/estimators.md.

    Args:
        sums: of all ranks.
        estimator, correction: as in `estimate`.

    Returns:
        group -> (low, high); (NaN, NaN) with too few samples, or for a group without a counted element.
    """
    value = estimate(sums, estimator, correction)
    result = {group: (math.nan, math.nan) for group in sums.groups}
    for row, group in enumerate(sums.groups):
        blocks = sums.blocks[:, row]
        blocks = blocks[blocks[:, BLOCK_COLUMN["count"]] > 0]
        if math.isnan(value[group]):
            continue
        if len(blocks) >= 2:
            level, unit = _level(value[group], sums, estimator, correction)
            quantile = t_quantile(len(blocks) - 1)
            result[group] = (
                block_interval(blocks, value[group], level, unit, estimator, correction, quantile) or result[group]
            )
        elif len(sums.replicates) and sums.spreads[row, WEIGHT] > 0:
            plain, floor = value[group], _floor(sums, correction)
            if estimator == "step_rms":
                line = sums.table[row]
                plain = float(line[COLUMN["step2_corrected" if correction else "step2"]] / line[COLUMN["count"]])
            elif estimator != "damping":
                floor = (1.0 if estimator == "pooled" else floor[0], floor[1])
                plain = (plain + floor[1]) / floor[0]
            samples = round(1 / sums.floor.floor)
            found = replicate_interval(
                sums.replicates[:, row], sums.spreads[row], plain, samples, floor, estimator, correction
            )
            result[group] = found
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
    """Check the precision of a multiplier, for `"samples": "auto"`.

    Args:
        alpha: a multiplier with its interval.
        rtol: largest half width of the interval, as a share of the multiplier.

    Returns:
        True if the interval is finite and that narrow.
    """
    if not (math.isfinite(alpha.low) and math.isfinite(alpha.high)):
        return False
    return (alpha.high - alpha.low) / 2.0 <= rtol * alpha.alpha


def histogram_median(histogram: Tensor) -> float:
    """Compute the median (mean of the two middle values) by interpolation.

    Args:
        histogram: number of elements in each bin, 1-D with `N_BINS` entries.

    Returns:
        The median; 9e-10 or 1e9 in the two open bins, NaN for an empty histogram.
    """
    cumulative = histogram.cumsum(0)
    total = int(cumulative[-1])
    if total == 0:
        return math.nan
    return 0.5 * (_ranked(histogram, cumulative, (total - 1) // 2) + _ranked(histogram, cumulative, total // 2))


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
    """Return (corrected SNR + 1/BLOCK, one unit of corrected SNR in `value`), for `block_interval`."""
    shrink, floor = sums.floor
    unit = 1.0 if correction or estimator == "pooled" or shrink <= 0 else 1.0 / shrink
    corrected = value if correction else value / unit - floor
    return max(corrected, 0.0) + 1.0 / BLOCK, unit


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
