"""From summed statistics to signal-to-noise ratios, 95 % intervals and learning-rate multipliers. Pure functions of `GroupSums`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mols_ds.errors import MolsConfigError, MolsError, MolsWarning
from mols_ds.snr import BLOCK_COLUMN, BINS_PER_OCTAVE, COLUMN, N_BINS, OCTAVES, GroupSums, noise_floor

Estimator = Literal["mean", "median", "pooled", "damping"]
ESTIMATORS: tuple[Estimator, ...] = ("mean", "median", "pooled", "damping")

# Two-sided 95 % quantiles of Student's t for 1..30 degrees of freedom (NIST/SEMATECH e-Handbook, table 1.3.6.7.2).
_T95 = (
    12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139,
    2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963,
    2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272,
)  # fmt: skip


class Alpha(NamedTuple):
    """A group's multiplier, whether a bound cut it, and its 95 % interval (NaN where unknown)."""

    alpha: float
    clamped: bool
    low: float
    high: float


def estimate(sums: GroupSums, estimator: Estimator, correction: bool) -> dict[str, float]:
    """Every group's SNR_m (or, for "damping", its mean effective signal step d_m in [0, 1]); NaN where no element counts.

    With K samples, shrink = (K-3)/(K-1), floor = 1/K (`sums.floor`), N the counted elements (s_i^2 > 0):
      mean     (1/N) sum SNR_i                          corrected: shrink * mean - floor
      median   of SNR_i, within a bin of at most 1 %    corrected: shrink * median - floor (a monotone map of each SNR_i)
      pooled   sum mu_i^2 / sum s_i^2                   corrected: (sum mu_i^2 - floor * sum s_i^2) / sum s_i^2
      damping  (1/N) sum |mu_i| / sqrt(mu_i^2 + s_i^2)  corrected: (1/N) sum sqrt(c_i/(1+c_i)), c_i = max(0, shrink * SNR_i - floor)

    Raises `MolsConfigError` for an unknown estimator, or for a correction of K <= 3 samples. Warns about elements whose statistics are
    not finite: they are left out.
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
        else:
            result[group] = line[COLUMN["damping_corrected" if correction else "damping"]] / count
    return result


def intervals(sums: GroupSums, estimator: Estimator, correction: bool) -> dict[str, tuple[float, float]]:
    """95 % intervals of `estimate`, from the spread between blocks of consecutive samples; (NaN, NaN) with fewer than 2 blocks.

    Elements of one sample are correlated, so counting elements says nothing about the error: only samples are independent. Each of
    the B blocks of L samples gives the estimator's value on every 127th element; half width = t(0.975, B-1) * spread / sqrt(B), where
      mean, pooled  the spread is that of the blocks' plain value relative to its mean. It applies to the value that L samples would read,
                    (SNR + 1/L) / shrink_L, since that, not the corrected SNR (which may be near 0), is what was seen to vary. For pure
                    noise this is wide (the error of K samples falls as 1/K, this as 1/sqrt(K L)), for signal it is right.
      median        blocks keep no histogram; the proxy is the geometric mean. SNR_i is a shape times a common level as far as shared
                    batch noise goes, and both the median and the geometric mean move with the level. Applied multiplicatively as above.
      damping       the absolute spread of the block values (plain or corrected with L's own floor): |mu_i|/s_i has a standard error that
                    falls as 1/sqrt(K) for signal and noise alike, so the spread of L samples over sqrt(B) is that of B * L samples.
    The interval covers the sampling error of the gradients (and, in mode "online", the drift during the window), not the bias that
    the estimator itself has for K samples.
    """
    value = estimate(sums, estimator, correction)
    shrink, floor = _floor(sums, correction)
    result = {group: (math.nan, math.nan) for group in sums.groups}
    if sums.blocks.shape[0] < 2:
        return result
    block_floor = noise_floor(sums.block_length)
    for row, group in enumerate(sums.groups):
        table = sums.blocks[:, row]
        table = table[table[:, BLOCK_COLUMN["count"]] > 0]
        if table.shape[0] < 2 or math.isnan(value[group]):
            continue
        values = _block_values(table, estimator, correction)
        error = t_quantile(table.shape[0] - 1) * float(values.std()) / math.sqrt(table.shape[0])
        if estimator == "damping":
            result[group] = (max(0.0, value[group] - error), min(1.0, value[group] + error))
            continue
        # The corrected estimate plus 1/L: what L samples would read, up to the factor shrink_L, which is put back below.
        own = sums.floor
        corrected = value[group] if correction else _corrected(value[group], own.shrink, own.floor, estimator)
        level = max(corrected, 0.0) + block_floor.floor
        if estimator == "median":
            low, high = level * math.expm1(-error), level * math.expm1(error)
        else:
            low, high = -level * error / float(values.mean()), level * error / float(values.mean())
        scale = 1.0 if correction or estimator == "pooled" or own.shrink <= 0 else 1.0 / own.shrink
        result[group] = (value[group] + low * scale, value[group] + high * scale)
    return result


class Shares(NamedTuple):
    """Shares of all elements of a group, in [0, 1]; NaN for a group without elements."""

    never_moved: float
    moved_once: float
    constant: float


def shares(sums: GroupSums) -> dict[str, Shares]:
    """What part of each group never moved, moved in exactly one sample (reads exactly 1/K), or had one non-zero value throughout."""
    result: dict[str, Shares] = {}
    for row, group in enumerate(sums.groups):
        line = sums.table[row].tolist()
        total = line[COLUMN["total"]]
        result[group] = Shares(
            *(line[COLUMN[name]] / total if total else math.nan for name in ("never_moved", "moved_once", "constant"))
        )
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
    """The resolved reference and every group's multiplier: sqrt(SNR_ref / SNR_m) (paper), for "damping" d_ref / d_m (eq. 4).

    Args:
        reference: a group of `sums.groups`; or a group type whose layers are groups ("vo" for "vo.0", "vo.1", ...: their union is the
            reference); or "max": the scaled group with the largest value.
        alpha_min, alpha_max: bounds, or None. A multiplier that a bound cut has `clamped` set.

    Groups of type "other", and groups without a counted element (all never moved), have alpha 1. A value <= 0 (no signal above the noise
    floor) gives alpha_max, clamped. `low` and `high` are of the multiplier after the bounds, from `intervals` of both groups taken as
    independent (batch noise that they share makes that wide, not narrow); (1, 1) for the reference itself.

    Raises:
        MolsConfigError: the reference has no elements; the message names the groups that exist.
        MolsError: the reference's value is <= 0 or undefined, or a group's value is <= 0 and there is no alpha_max.
    """
    values = estimate(sums, estimator, correction)
    bounds = intervals(sums, estimator, correction)
    name = _largest(values) if reference == "max" else reference
    if name not in values:
        values, bounds = dict(values), dict(bounds)
        union = _reference_union(sums, name)
        values[name] = estimate(union, estimator, correction)[name]
        bounds[name] = intervals(union, estimator, correction)[name]
    elif sums.column("total")[name] == 0:
        raise MolsConfigError(_absent(sums, name))
    if math.isnan(values[name]) or values[name] <= 0:
        raise MolsError(f"reference group {name!r} has no usable SNR ({estimator}: {values[name]:g}): no multiplier can be computed")
    power = 1.0 if estimator == "damping" else 0.5
    alphas: dict[str, Alpha] = {}
    for group in sums.groups:
        if _base(group) == "other" or math.isnan(values[group]):
            alphas[group] = Alpha(1.0, False, 1.0, 1.0)
            continue
        if values[group] <= 0 and alpha_max is None:
            raise MolsError(
                f"group {group!r} has no signal above the noise ({estimator}: {values[group]:g}) and there is no alpha_max; "
                "set alpha_max, take more samples or another estimator"
            )
        raw = (values[name] / values[group]) ** power if values[group] > 0 else math.inf
        alpha = _bounded(raw, alpha_min, alpha_max)
        down, up = (0.0, 0.0) if group == name else _log_errors(values, bounds, name, group)
        low = _bounded(raw * math.exp(-power * down), alpha_min, alpha_max)
        high = _bounded(raw * math.exp(min(power * up, 700.0)) if up < math.inf else math.inf, alpha_min, alpha_max)
        alphas[group] = Alpha(alpha, alpha != raw, low, high)
    return name, alphas


def histogram_median(histogram: Tensor) -> float:
    """The median of the values counted in a 1-D histogram of `N_BINS` bins (mean of the two middle ones), interpolated within its bin.

    In the outermost bins, which are open, it is the finite edge (9e-10 or 1e9). NaN for an empty histogram.
    """
    cumulative = histogram.cumsum(0)
    total = int(cumulative[-1])
    if total == 0:
        return math.nan
    return 0.5 * (_ranked(histogram, cumulative, (total - 1) // 2) + _ranked(histogram, cumulative, total // 2))


def t_quantile(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t; above 30 degrees of freedom by Cornish and Fisher's expansion (relative error < 1e-6)."""
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


def _corrected(plain: float, shrink: float, floor: float, estimator: Estimator) -> float:
    return plain - floor if estimator == "pooled" else shrink * plain - floor


def _block_values(table: Tensor, estimator: Estimator, correction: bool) -> Tensor:
    """The value of each block, (B,), from its sums (B, len(BLOCK_COLUMNS)); the logarithm of the geometric mean for "median"."""
    if estimator == "pooled":
        return table[:, BLOCK_COLUMN["mu2"]] / table[:, BLOCK_COLUMN["s2"]]
    damping = "damping_corrected" if correction else "damping"
    column = {"mean": "snr", "median": "log_snr", "damping": damping}[estimator]
    return table[:, BLOCK_COLUMN[column]] / table[:, BLOCK_COLUMN["count"]]


def _log_errors(
    values: Mapping[str, float], bounds: Mapping[str, tuple[float, float]], reference: str, group: str
) -> tuple[float, float]:
    """How far log(value_ref / value_m) can be (down, up) at 95 %, both groups' errors added in quadrature; inf where a bound is <= 0."""

    def side(name: str) -> tuple[float, float]:
        low, high = bounds[name]
        if math.isnan(low) or values[name] <= 0:
            return (math.nan, math.nan) if math.isnan(low) else (0.0, math.inf)
        return (math.log(values[name] / low) if low > 0 else math.inf), math.log(high / values[name])

    (ref_down, ref_up), (down, up) = side(reference), side(group)
    return math.hypot(ref_down, up), math.hypot(ref_up, down)


def _ranked(histogram: Tensor, cumulative: Tensor, rank: int) -> float:
    """The value of the element at 0-based `rank` in ascending order, by geometric interpolation inside its bin."""
    index = int(torch.searchsorted(cumulative, torch.tensor(float(rank), dtype=cumulative.dtype), right=True))
    if index == 0:
        return 2.0**-OCTAVES
    if index == N_BINS - 1:
        return 2.0**OCTAVES
    inside = (rank + 0.5 - float(cumulative[index - 1])) / float(histogram[index])
    return float(2.0 ** ((index - 1 + inside) / BINS_PER_OCTAVE - OCTAVES))


def _bounded(alpha: float, low: float | None, high: float | None) -> float:
    if low is not None and alpha < low:
        return low
    return high if high is not None and alpha > high else alpha


def _base(group: str) -> str:
    return group.partition(".")[0]


def _largest(values: Mapping[str, float]) -> str:
    usable = {group: value for group, value in values.items() if _base(group) != "other" and not math.isnan(value)}
    if not usable:
        raise MolsError("reference='max': no scaled group has an element that moved, no multiplier can be computed")
    return max(usable, key=lambda group: usable[group])


def _reference_union(sums: GroupSums, reference: str) -> GroupSums:
    """The sums of all layers of a group type, for a reference that is not a group itself."""
    total = sums.column("total")
    members = [group for group in sums.groups if _base(group) == reference and total[group] > 0]
    if not members:
        raise MolsConfigError(_absent(sums, reference))
    return sums.combined(members, reference)


def _absent(sums: GroupSums, reference: str) -> str:
    present = [group for group, total in sums.column("total").items() if total > 0 and _base(group) != "other"]
    return f"reference={reference!r}: the model has no element in that group; use one of {', '.join(present)} or 'max'"
