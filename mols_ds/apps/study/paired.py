"""Student's t for differences paired by seed, and Holm's adjustment for many comparisons. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import stats


class Difference(NamedTuple):
    """An arm's final loss minus the baseline's over their common seeds, in nats per token.

    mean: infinite if the arm diverged with one of these seeds, minus infinite if the baseline did, NaN if both did.
    low, high: paired 95 % t-interval of the mean. p: two-sided p-value of "no difference". All three are None with
        fewer than two pairs or a diverged run.
    pairs: common seeds. won: those where the arm's loss is lower; a diverged run loses to a finite one.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    pairs: int
    won: int

    @property
    def clear(self) -> bool:
        """True if the interval excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def compare(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Compare the final losses of two arms (seed -> loss, infinite if diverged). Return None without a common seed."""
    seeds = [seed for seed in arm if seed in baseline]
    if not seeds:
        return None
    mine, theirs = [arm[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    won = sum(a < b for a, b in zip(mine, theirs, strict=True))
    if not all(map(math.isfinite, [*mine, *theirs])):
        # Means with an infinite value: inf - finite, finite - inf, or inf - inf, which is NaN.
        return Difference(math.fsum(mine) - math.fsum(theirs), None, None, None, len(seeds), won)
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    mean = statistics.fmean(differences)
    if len(seeds) < 2:
        return Difference(mean, None, None, None, len(seeds), won)
    error = statistics.stdev(differences) / math.sqrt(len(seeds))
    if error == 0:  # the same difference with every seed
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, len(seeds), won)
    student = stats.t(len(seeds) - 1)
    half = float(student.ppf(0.975)) * error
    return Difference(mean, mean - half, mean + half, float(2 * student.sf(abs(mean / error))), len(seeds), won)


class Ratio(NamedTuple):
    """A share with its 95 % interval."""

    value: float
    low: float
    high: float


def share(arm: Mapping[int, float], searched: Mapping[int, float], baseline: Mapping[int, float]) -> Ratio | None:
    """Return the arm's gain over the baseline divided by that of `searched`, over the seeds that all three have.

    Losses by seed. The interval is Fieller's (1954) for the ratio of two means of paired values. None with fewer than
    two seeds, or unless the 95 % interval of the searched gain is above zero: a share of nothing means nothing.
    """
    seeds = [seed for seed in arm if seed in searched and seed in baseline]
    gains = [(baseline[seed] - arm[seed], baseline[seed] - searched[seed]) for seed in seeds]
    if len(gains) < 2 or not all(math.isfinite(value) for pair in gains for value in pair):
        return None
    mine, theirs = zip(*gains, strict=True)
    a, b = statistics.fmean(mine), statistics.fmean(theirs)
    scale = float(stats.t(len(gains) - 1).ppf(0.975)) ** 2 / len(gains)
    square = b * b - scale * statistics.variance(theirs)
    if b <= 0 or square <= 0:
        return None
    middle = (a * b - scale * statistics.covariance(mine, theirs)) / square
    root = math.sqrt(max(0.0, middle * middle - (a * a - scale * statistics.variance(mine)) / square))
    return Ratio(a / b, middle - root, middle + root)


def holm(values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values in input order: the i-th smallest of m times m + 1 - i, monotone, at most 1.

    Rejecting below 0.05 keeps the probability of any false rejection among all m below 5 %, for any dependence between
    the comparisons (Holm 1979).
    """
    adjusted = [0.0] * len(values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = highest
    return adjusted
