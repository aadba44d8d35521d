"""Replicates of a calibration from half samples, for the 95 % intervals.

Elements of one sample are correlated in an unknown way, so the error of a group's value has to come from the samples.
A replicate splits the K samples at random into halves A and B. (mean_A - mean_B) / 2 has the distribution of the error
of the mean of all K, for all elements at once, and (s_A^2 - s_B^2) / 2 that of the error of s^2. Added to estimates of
the true mean and variance they give one more possible result of the calibration (balanced repeated replication,
McCarthy 1969). The variance between replicates estimates the variance of the result. `estimators.intervals` uses it.

Where little signal is above the noise, four steps keep the variance from being too large or too small:

- The true mean is not the measured one, whose square has noise in it: each mean is shrunk by
  sqrt(mu^2 / (mu^2 + s^2/K)), and all by one factor, so that the mean of (mu^2 - s^2/K) / (mu^2 + (1 - 1/K) s^2) stays.
- The sizes of two samples' gradients may differ. If half A has the larger ones, the difference of the halves has a part
  along the measured mean that is noise. It is subtracted.
- A change of s^2 that all elements share changes the noise of the mean too.
- What is left of the change of s^2 gets the distribution of K samples, not of half of them (Wilson and Hilferty 1931).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mols_ds.core.columns import ALL, BETWEEN, CURVE, CURVE_AT, KEPT, SPREADS, VALUE, VALUES, WEIGHT
from mols_ds.core.group_stats import NoiseFloor, dampings, squared_steps

REPLICATES = 32
FEWEST = 8
"""Samples that an interval needs."""
CHUNK = 1 << 12  # elements: the temporaries of one chunk take 1 MiB each
EPSILON = 0.01  # share of s^2 that is added to those of the halves: an element may have moved in one half only


def halves(cells: int) -> Tensor:
    """Choose the half samples, the same on every rank.

    Args:
        cells: number of cells that the samples are divided into.

    Returns:
        float64 on the CPU, (REPLICATES, cells): 1 for a cell in half A, else 0.
    """
    draws = torch.rand(REPLICATES, cells, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    return (draws.argsort(1) < cells // 2).to(torch.float64)


def replicate(
    cells: Tensor, squares: Tensor | None, mean: Tensor, s2: Tensor, samples: int, floor: NoiseFloor, weight: float
) -> tuple[Tensor, Tensor]:
    """Replicate the sums of one group.

    Args:
        cells: (C, n), any float dtype; the means of C cells of samples. Sample k is in cell k mod C.
        squares: sums of squared deviations within the cells; None if each cell has one sample.
        mean, s2: float64 (n,) of all samples, s2 > 0.
        samples: K, at least `FEWEST`.
        floor: as in `GroupSums`.
        weight: elements of the group for each of these.

    Returns:
        float64 on the CPU: replicates (REPLICATES, len(VALUES)) and spreads (SPREADS,), both sums over elements.
    """
    device = mean.device
    split = _Halves(cells, squares, mean, samples)
    size = 1.0 / (mean * mean + (1.0 - floor.floor) * s2)  # of a mean square; makes sums independent of units

    shares_a, shares_b, larger, along = (torch.zeros(REPLICATES, dtype=torch.float64, device=device) for _ in range(4))
    for where, _, var_a, var_b in split:
        shares_a += (var_a / s2[where]).sum(1)
        shares_b += (var_b / s2[where]).sum(1)
        larger += (var_a - var_b).sum(1)
        along += ((var_a - var_b) * size[where]).sum(1)
    common = (1.0 + (shares_a - shares_b)[:, None] / (2 * mean.numel())).clamp_(min=0.05)
    summed = (1.0 + larger[:, None] / (2 * s2.sum())).clamp_(min=0.05)
    tilt = (split.root / samples)[:, 0] * along / (mean * mean * size).sum().clamp(min=1e-300)
    shift = (shares_a / shares_b.clamp(min=1e-300)).clamp(1e-3, 1e3).log()[:, None]
    signal = _shrunk(mean, s2, size, samples)
    width = _log_width(split.n_a, split.n_b)

    mu2 = mean * mean
    pilot = (mu2 / s2).median()
    at_estimate = _values(mu2, s2, mu2, s2, floor, pilot)
    totals = torch.zeros(REPLICATES, len(VALUES), dtype=torch.float64, device=device)
    spreads = torch.zeros(SPREADS, dtype=torch.float64, device=device)
    levels = pilot * torch.tensor(CURVE, dtype=torch.float64, device=device).exp()
    for where, difference, var_a, var_b in split:
        difference = difference - tilt[:, None] * mean[where]
        z = ((var_a + EPSILON * s2[where]) / (var_b + EPSILON * s2[where])).log().sub_(shift) / width
        var = s2[where] * common * _wilson_hilferty(z, samples - 1)
        square = (signal[where] + difference * common.sqrt()).square_()
        of_sums = (signal[where] + difference * summed.sqrt()).square_()
        values = _values(square, var, of_sums, s2[where] + (var_a - var_b) / 2, floor, pilot)
        totals += values.sum(2).T
        spreads[ALL] += _squares(values - values.mean(1, keepdim=True)).sum((1, 2)) / (REPLICATES - 1)
        bins = torch.bincount(torch.bucketize(values[VALUE["snr"]], levels).flatten(), minlength=len(CURVE) + 1)
        spreads[CURVE_AT:] += bins[:-1].cumsum(0) / REPLICATES
    spreads[BETWEEN] = _squares(at_estimate - at_estimate.mean(1, keepdim=True)).sum(1)
    spreads[WEIGHT] = mean.numel()
    spreads[KEPT] = spreads[ALL] * weight
    return (totals * weight).cpu(), (spreads * weight).cpu()


class _Halves:
    """The two halves of each replicate. Iterates over chunks of elements, arguments as of `replicate`.

    Attributes:
        n_a, n_b: samples in half A and B, (REPLICATES, 1).
        root: sqrt(n_a n_b) / K, which scales the difference of the halves' means to the error of the mean of all.
    """

    def __init__(self, cells: Tensor, squares: Tensor | None, mean: Tensor, samples: int) -> None:
        number = cells.shape[0]
        counts = [len(range(cell, samples, number)) for cell in range(number)]
        self._cells, self._squares, self._mean = cells, squares, mean
        self._of_a = halves(number).to(mean.device)
        self._sizes = torch.tensor(counts, dtype=torch.float64, device=mean.device)[:, None]
        self.n_a = self._of_a @ self._sizes
        self.n_b = samples - self.n_a
        self.root = (self.n_a * self.n_b).sqrt() / samples

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield (elements, difference of the halves, variance in A, in B), the last three (REPLICATES, elements)."""
        for at in range(0, self._mean.numel(), CHUNK):
            where = slice(at, at + CHUNK)
            apart = self._cells[:, where].to(torch.float64) - self._mean[where]
            square = self._sizes * apart * apart
            if self._squares is not None:
                square[: self._squares.shape[0]] += self._squares[:, where]
            mean_a, var_a = self._moments(self._of_a, self.n_a, apart, square)
            mean_b, var_b = self._moments(1.0 - self._of_a, self.n_b, apart, square)
            yield where, (mean_a - mean_b) * self.root, var_a, var_b

    def _moments(self, chosen: Tensor, count: Tensor, apart: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        total = chosen @ (self._sizes * apart)
        return total / count, ((chosen @ square - total * total / count) / (count - 1)).clamp_(min=0.0)


def _values(mu2: Tensor, s2: Tensor, sum_mu2: Tensor, sum_s2: Tensor, floor: NoiseFloor, pilot: Tensor) -> Tensor:
    """Each of `VALUES` for each element, (len(VALUES), ...)."""
    ratio = mu2 / s2
    below = (ratio <= pilot).to(torch.float64)
    steps = squared_steps(mu2, s2, floor.floor)
    return torch.stack([ratio, sum_mu2, sum_s2, *dampings(mu2, s2, ratio, floor), *steps, below])


def _squares(deviations: Tensor) -> Tensor:
    """Squares of the values, then the product of mu2 and s2: one row more."""
    product = deviations[VALUE["mu2"]] * deviations[VALUE["s2"]]
    return torch.cat([deviations * deviations, product[None]])


def _shrunk(mean: Tensor, s2: Tensor, size: Tensor, samples: int) -> Tensor:
    """Means that have about the true squares, (n,): see the top of this file."""
    share = mean * mean / (mean * mean + s2 / samples)
    kept = (share * mean * mean * size).sum().clamp(min=1e-300)
    signal = ((mean * mean - s2 / samples) * size).sum() / kept
    return mean * (share * signal.clamp(0.0, 1.0)).sqrt_()


def _log_width(n_a: Tensor, n_b: Tensor) -> Tensor:
    """Standard deviation of log(s_A^2 / s_B^2) for Gaussian noise."""
    return (torch.polygamma(1, (n_a - 1) / 2) + torch.polygamma(1, (n_b - 1) / 2)).sqrt_()


def _wilson_hilferty(z: Tensor, degrees: int) -> Tensor:
    """Chi-squared over its degrees of freedom, from a standard normal z; at least 0.064."""
    part = 2.0 / (9.0 * degrees)
    root = (1.0 - part + z * math.sqrt(part)).clamp_(min=0.4)
    return root * root * root
