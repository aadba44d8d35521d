"""Student's t for differences that are paired by seed, and Holm's adjustment for many comparisons. Pure numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mols_ds.core.estimators import t_quantile

DEPTH = 500
"""Terms of the continued fraction: it needs about sqrt(max(a, b)) of them, so this serves thousands of seeds."""


class Difference(NamedTuple):
    """An arm's final loss minus the baseline's over the seeds that both have, in nats a token.

    mean: infinite where the arm diverged with one of these seeds, minus infinite where the baseline did, NaN where both
        did. low, high: paired 95 % t-interval of the mean. p: two-sided p-value of "no difference". All three are None
        with fewer than two pairs or a diverged run. pairs: seeds that both have. won: those of them where the arm's
        loss is lower; a diverged run loses to a finite one.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    pairs: int
    won: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def compare(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """The difference of two arms' final losses (seed -> loss, infinite where diverged); None without a common seed."""
    seeds = [seed for seed in arm if seed in baseline]
    if not seeds:
        return None
    mine, theirs = [arm[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    won = sum(a < b for a, b in zip(mine, theirs, strict=True))
    if not all(map(math.isfinite, [*mine, *theirs])):
        # As means with an infinite member: inf - finite, finite - inf, or inf - inf, which is NaN.
        return Difference(math.fsum(mine) - math.fsum(theirs), None, None, None, len(seeds), won)
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    mean = statistics.fmean(differences)
    if len(seeds) < 2:
        return Difference(mean, None, None, None, len(seeds), won)
    error = statistics.stdev(differences) / math.sqrt(len(seeds))
    half = t_quantile(len(seeds) - 1) * error
    if error == 0:  # the same difference with every seed
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, len(seeds), won)
    p = p_value(mean / error, len(seeds) - 1)
    return Difference(mean, mean - half, mean + half, p, len(seeds), won)


def p_value(t: float, degrees: int) -> float:
    """Two-sided p-value of Student's t: I_x(n/2, 1/2) with x = n / (n + t^2), n the degrees of freedom (DLMF 8.17)."""
    if math.isinf(t):
        return 0.0
    return incomplete_beta(degrees / (degrees + t * t), 0.5 * degrees, 0.5)


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), 0 <= x <= 1, by its continued fraction (DLMF 8.17.22).

    Where the fraction converges slowly, x above (a + 1) / (a + b + 2), by the symmetry I_x(a, b) = 1 - I_(1-x)(b, a).
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1.0 - incomplete_beta(1 - x, b, a)
    fraction = 1.0
    for term in range(DEPTH, 0, -1):
        m = term // 2
        if term % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1 + d / fraction
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(logarithm) / (a * fraction)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: the i-th smallest of m times m + 1 - i, made monotone, at most 1.

    Rejecting where they are below 0.05 keeps the chance of one false rejection or more among all m below 5 %, whatever
    the dependence between the comparisons (Holm 1979).
    """
    adjusted = [0.0] * len(values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = highest
    return adjusted
