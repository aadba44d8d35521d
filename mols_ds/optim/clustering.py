"""One-dimensional K-means and exact medians over layers whose elements are spread over ranks.

Only counts and sums are communicated, the same number on every rank, also for layers without elements there. Results
are the same on every rank. They do not depend on the sharding, except for float64 rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LayerPart = tuple[int, Tensor]
"""(layer index, this rank's values of it, 1-D float32)."""
Reduce = Callable[[Tensor], Tensor]
"""SUM of a 1-D float64 tensor over the ranks; the identity if one rank has everything."""

CHUNK = 1 << 22
"""Elements per chunk; limits memory."""
DIGITS, BITS = 4, 8
"""A float32 is read as this many digits of this many bits."""


class Clustered(NamedTuple):
    """means: float32 (layers,). centers: float32 (layers, clusters), ascending in each layer."""

    means: Tensor
    centers: Tensor


class Medians(NamedTuple):
    """clusters: float32 (layers, clusters), NaN where a cluster is empty. overall: a float32 scalar."""

    clusters: Tensor
    overall: Tensor


def first_centers(mean: Tensor, deviation: Tensor, clusters: int) -> Tensor:
    """Spread centers evenly over mean +- 1.5 standard deviations. Both (layers,); result (layers, clusters), sorted."""
    reach = 1.5 if clusters > 1 else 0.0
    return mean[:, None] + deviation[:, None] * torch.linspace(-reach, reach, clusters).to(mean)


def nearest(values: Tensor, centers: Tensor) -> Tensor:
    """Return the index of the nearest center, int64 (n,), for `values` (n,). centers: (clusters,), sorted.

    A tie goes to the lower center.
    """
    return torch.bucketize(values, (centers[1:] + centers[:-1]) / 2)


def cluster(
    parts: Sequence[LayerPart], sizes: Tensor, start: Tensor | None, clusters: int, reduce: Reduce, iterations: int
) -> Clustered:
    """Run Lloyd's K-means in each layer, until no element changes its cluster or for `iterations` rounds.

    A cluster without elements keeps its center. Collective: one reduction, and one more per round.

    Args:
        sizes: elements of each whole layer, float64 (layers,).
        start: initial centers (layers, clusters); any values for layers without elements here. None: `first_centers`.
    """
    moments = sizes.new_zeros(2, sizes.numel())
    for layer, values in parts:
        moments[0, layer] += values.sum(dtype=torch.float64)
        moments[1, layer] += torch.linalg.vector_norm(values, dtype=torch.float64).square()
    mean, square = reduce(moments.view(-1)).view_as(moments) / sizes.clamp(min=1)
    centers = first_centers(mean, (square - mean**2).clamp(min=0).sqrt(), clusters) if start is None else start
    centers = centers.to(torch.float32)
    before: Tensor | None = None
    for _ in range(iterations):
        sums = _sums(parts, centers, sizes)
        sums = reduce(sums.view(-1)).view_as(sums)
        if before is not None and torch.equal(sums[0], before):  # clusters are intervals: their sizes define them
            break
        before = sums[0].clone()
        centers = torch.where(sums[0] > 0, sums[1] / sums[0].clamp(min=1), centers.double()).to(torch.float32)
    return Clustered(mean.to(torch.float32), centers)


def _sums(parts: Sequence[LayerPart], centers: Tensor, sizes: Tensor) -> Tensor:
    """Return count and sum of this rank's elements per cluster, float64 (2, layers, clusters)."""
    result = sizes.new_zeros(2, *centers.shape)
    for layer, values in _chunks(parts):
        index = nearest(values, centers[layer])
        for c in range(centers.shape[1]):
            chosen = values[index == c]
            result[0, layer, c] += chosen.numel()
            result[1, layer, c] += chosen.sum(dtype=torch.float64)
    return result


def median_deviations(parts: Sequence[LayerPart], found: Clustered, reduce: Reduce) -> Medians:
    """Return medians of |value - mean of its layer|, per cluster and over the model.

    Exact: the lower of the two middle values for an even number. Bits of non-negative float32 sort like their values,
    so four rounds that count 8 bits each find the median. Collective: four reductions of 256 x (layers x clusters + 1)
    counts.
    """
    layers, clusters = found.centers.shape
    rows, values = layers * clusters + 1, 1 << BITS
    prefix = torch.zeros(rows, dtype=torch.int64, device=found.means.device)
    left = counts = prefix
    for digit in range(DIGITS):
        shift = BITS * (DIGITS - 1 - digit)
        seen = _histogram(parts, found, prefix, shift).to(torch.float64)
        table = reduce(seen.view(-1)).view(rows, values).to(torch.int64)
        if digit == 0:
            counts = table.sum(1)
            left = ((counts - 1) // 2).clamp(min=0)
        running = table.cumsum(1)
        chosen = (running <= left[:, None]).sum(1).clamp(max=values - 1)
        left = left - (running - table).gather(1, chosen[:, None])[:, 0]
        prefix = prefix * values + chosen
    medians = prefix.to(torch.int32).view(torch.float32)
    medians = torch.where(counts > 0, medians, torch.full_like(medians, torch.nan))
    return Medians(medians[:-1].view(layers, clusters), medians[-1])


def _histogram(parts: Sequence[LayerPart], found: Clustered, prefix: Tensor, shift: int) -> Tensor:
    """Count the digits at `shift` among elements that start with the row's `prefix`, int64 (rows, 256)."""
    clusters, values = found.centers.shape[1], 1 << BITS
    table = torch.zeros(prefix.numel(), values, dtype=torch.int64, device=prefix.device)
    for layer, part in _chunks(parts):
        bits = (part - found.means[layer]).abs().view(torch.int32).to(torch.int64)
        digit, before = bits >> shift & (values - 1), bits >> shift + BITS
        index = nearest(part, found.centers[layer])
        own = slice(layer * clusters, (layer + 1) * clusters)
        fits = before == prefix[own][index]
        places = index[fits] * values + digit[fits]
        table[own] += torch.bincount(places, minlength=clusters * values).view(clusters, values)
        table[-1] += torch.bincount(digit[before == prefix[-1]], minlength=values)
    return table


def _chunks(parts: Sequence[LayerPart]) -> Iterator[LayerPart]:
    for layer, values in parts:
        for part in torch.split(values, CHUNK):
            yield layer, part
