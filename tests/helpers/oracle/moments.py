"""The statistics in Adam's moments, float64, naive; and the interval of each estimator that float32 moments may give.

Per element, with bias-corrected m and v (METHOD): the plain mu^2 is m^2, and s^2 = (v - m^2) / (1 - c), where c is the
sum of the squared weights that the steps have in m. Where v - m^2 is below m^2 / 256, an element has no ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.helpers.oracle.histogram import histogram_median
from tests.helpers.oracle.models import GROUPS
from tests.helpers.oracle.statistics import rows_of

# How far v - m^2 may be off, relative to v. Each of a moment's updates rounds three times, u = 2^-24 each, which over t
# steps sums up to 3 u (1 - b^t) / (1 - b) of the moment: 75 u = 4.5e-6 in v - m^2 after 12 steps of betas (0.9, 0.95),
# 53 u after 7. Between SSE, AVX2 and AVX-512 kernels, gradients and weights included, the elements with v - m^2 below
# v / 50 moved by at most 6e-7, others by up to 6e-6 in both directions, which an average over a group does not see.
ERROR = 2.0**-18
AT_THE_CUT = 3  # elements of a group that may be on either side of the cut; up to 1 here
NARROW = 1e-3  # of an interval, relative: what the comparison can tell at least. Up to 7e-4 here, of `mean`


@dataclass(frozen=True, slots=True)
class MomentValues:
    """The moments of one group. m2 (m^2) and v: of the elements that moved, float64; c: the weight of noise in m2."""

    elements: int
    m2: Tensor
    v: Tensor
    c: float
    never_moved: int
    unseen: int | None

    @classmethod
    def of(
        cls, exp_avg: Tensor, exp_avg_sq: Tensor, steps: int, betas: tuple[float, float], kept: Tensor, known: bool
    ) -> MomentValues:
        """From 1-D m and v as Adam keeps them after `steps` updates; kept: in rows of tokens that occurred."""
        beta1, beta2 = betas
        shares = [(1 - beta1) * beta1 ** (steps - k) / (1 - beta1**steps) for k in range(1, steps + 1)]
        moves = (exp_avg_sq != 0) | (exp_avg != 0)
        moved = moves & kept
        m = exp_avg[moved].double() / (1 - beta1**steps)
        v = exp_avg_sq[moved].double() / (1 - beta2**steps)
        still, unseen = int((~moves).sum()), int((~kept).sum()) if known else None
        return cls(exp_avg.numel(), m**2, v, sum(share**2 for share in shares), still, unseen)

    def estimate(self, estimator: str, corrected: bool) -> float:
        """Without any allowance for rounding."""
        return self._estimate(self._keeps(0.0), estimator, corrected, 0.0)

    def bounds(self, estimator: str, corrected: bool, left_out: int | None = None) -> tuple[float, float]:
        """What the estimate may be when v - m^2 is off by `ERROR` of v in every element, and m^2 by as much of itself.

        An estimate grows with m^2, with 1 / s^2 and with each further element at the cut, because no ratio is higher.
        So the lower bound is without the elements that may be on either side, and the upper one is with them. Where
        `left_out` tells how many moved elements have no ratio, that many of them: those of low m^2 make "pooled" low.
        """
        sure, at_the_cut = self._keeps(-ERROR), self._keeps(ERROR) & ~self._keeps(-ERROR)
        order = at_the_cut.nonzero().flatten()[self.m2[at_the_cut].argsort()]
        fewest, most = (0, len(order)) if left_out is None else (self.m2.numel() - left_out - int(sure.sum()),) * 2
        lowest, highest = sure.clone(), sure.clone()
        lowest[order[:fewest]] = True
        highest[order[len(order) - most :]] = True
        low = self._estimate(lowest, estimator, corrected, -ERROR)
        high = self._estimate(highest, estimator, corrected, ERROR)
        slack = ERROR * abs(low)  # where no rounding acts, the two are equal
        return low - slack, high + slack

    def left_out(self) -> tuple[int, int]:
        """How many elements that moved have no ratio, at least and at most."""
        fewest, most = (int((~self._keeps(error)).sum()) for error in (ERROR, -ERROR))
        return fewest, most

    def v_below_m2(self) -> int:
        """Number of elements without a ratio because v < m^2, for any cut."""
        return int((self.v < self.m2).sum())

    def _keeps(self, error: float) -> Tensor:
        """Which elements have a ratio when v - m^2 is by `error` more in favour of it. Below 0: for certain."""
        return 256 * (self.v - self.m2 + error * self.v) >= self.m2 * (1 - error)

    def _estimate(self, kept: Tensor, estimator: str, corrected: bool, error: float) -> float:
        """Of the `kept` elements, whose ratios are all off by `error`."""
        v, floor = self.v[kept], self.c if corrected else 0.0
        m2, s2 = self.m2[kept] * (1 + error), (v - self.m2[kept] - error * v) / (1 - self.c)
        snr = m2 / s2
        if estimator == "mean":
            return float(snr.mean()) - floor
        if estimator == "median":
            return histogram_median(snr) - floor
        if estimator == "pooled":
            return float(m2.sum() / s2.sum()) - floor
        if estimator == "step_rms":
            return max(0.0, float(((snr - floor) / (snr + 1 - floor)).mean())) ** 0.5
        signal = (snr - floor).clamp(min=0.0)
        return float((signal / (1 + signal)).sqrt().mean())


def moment_values(
    moments: Mapping[str, tuple[Tensor, Tensor]],
    masks: Mapping[str, Tensor],
    steps: int,
    betas: tuple[float, float],
    tokens: Tensor | None = None,
) -> dict[str, MomentValues]:
    """The values of each group that the model has, from every parameter's (exp_avg, exp_avg_sq).

    tokens: as in `statistics.group_values`.
    """
    result, rows = {}, rows_of(tokens, masks)
    for index, group in enumerate(GROUPS):
        m, v = (torch.cat([moments[name][i][mask == index] for name, mask in masks.items()]) for i in (0, 1))
        if m.numel():
            kept = torch.cat([rows[name][mask == index] for name, mask in masks.items()])
            result[group] = MomentValues.of(m, v, steps, betas, kept, tokens is not None)
    return result


def check_rows(rows: Mapping[str, Mapping[str, Any]], values: Mapping[str, MomentValues]) -> None:
    """A report's groups: counts exactly, but for elements at the cut; uncorrected estimators within their bounds."""
    assert list(rows) == list(values)
    for group, expected in values.items():
        row, elements = rows[group], expected.elements
        assert row["elements"] == elements
        assert row["never_moved_share"] == expected.never_moved / elements
        assert row["unseen_share"] == (None if expected.unseen is None else expected.unseen / elements)
        left_out, (fewest, most) = round(row["constant_share"] * elements), expected.left_out()
        assert fewest <= left_out <= most <= fewest + AT_THE_CUT, group
        for estimator in ("mean", "median", "pooled", "damping", "step_rms"):
            low, high = expected.bounds(estimator, False, left_out)
            assert high - low <= NARROW * low, (group, estimator, low, high)
            found = row[estimator if estimator in ("damping", "step_rms") else f"snr_{estimator}"]
            assert low <= found <= high, (group, estimator, low, found, high)


def alpha_bounds(values: Mapping[str, MomentValues], estimator: str, reference: str) -> dict[str, tuple[float, float]]:
    """The interval of each uncorrected, unbounded alpha: (SNR_ref / SNR_m)^(1/2), or d_ref / d_m for steps."""
    power = 1.0 if estimator in ("damping", "step_rms") else 0.5
    bounds = {group: value.bounds(estimator, False) for group, value in values.items()}
    low, high = bounds[reference]
    result = {group: ((low / b) ** power, (high / a) ** power) for group, (a, b) in bounds.items()}
    return result | {"other": (1.0, 1.0)}
