"""One-dimensional K-means and exact medians of the layers of a model whose elements are spread over the ranks.

What goes over the wire are counts and sums, as many on every rank whether it holds something of a layer or not: every
result is the same on every rank, and but for the rounding of float64 sums does not depend on how the elements are
spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LayerPart = tuple[int, Tensor]
"""(number of a layer, the 1-D float32 values of it that are on this rank)."""
Reduce = Callable[[Tensor], Tensor]
"""SUM of a 1-D float64 tensor over the ranks; the identity where one rank holds everything."""

CHUNK = 1 << 22
"""Elements that are counted at a time; bounds the memory of a clustering."""
DIGITS, BITS = 4, 8
"""A float32 is read as this many digits of so many bits."""


class Clustered(NamedTuple):
    """means: float32 (layers,). centers: float32 (layers, clusters), ascending in each layer."""

    means: Tensor
    centers: Tensor


class Medians(NamedTuple):
    """clusters: float32 (layers, clusters), NaN where a cluster is empty. overall: a float32 scalar."""

    clusters: Tensor
    overall: Tensor


def first_centers(mean: Tensor, deviation: Tensor, clusters: int) -> Tensor:
    """Evenly spread over mean +- 1.5 standard deviations; both (layers,), the result (layers, clusters), ascending."""
    reach = 1.5 if clusters > 1 else 0.0
    return mean[:, None] + deviation[:, None] * torch.linspace(-reach, reach, clusters).to(mean)


def nearest(values: Tensor, centers: Tensor) -> Tensor:
    """Index of the nearest centre, int64 (n,), of each of `values` (n,); centers: (clusters,), ascending.

    Half-way between two centres the lower one wins.
    """
    return torch.bucketize(values, (centers[1:] + centers[:-1]) / 2)


def cluster(
    parts: Sequence[LayerPart], sizes: Tensor, start: Tensor | None, clusters: int, reduce: Reduce, iterations: int
) -> Clustered:
    """Lloyd's K-means within each layer, until no element changes its cluster or for `iterations` rounds.

    sizes: elements of each whole layer, float64 (layers,). start: centres to begin with, (layers, clusters), of which
    those of layers that this rank holds nothing of do not matter; None: `first_centers`.
    A cluster without elements keeps its centre. Collective: one reduction, and one more a round.
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
        if before is not None and torch.equal(sums[0], before):  # clusters are intervals: their sizes tell which
            break
        before = sums[0].clone()
        centers = torch.where(sums[0] > 0, sums[1] / sums[0].clamp(min=1), centers.double()).to(torch.float32)
    return Clustered(mean.to(torch.float32), centers)


def _sums(parts: Sequence[LayerPart], centers: Tensor, sizes: Tensor) -> Tensor:
    """Count and sum of this rank's elements of each cluster, float64 (2, layers, clusters)."""
    result = sizes.new_zeros(2, *centers.shape)
    for layer, values in _chunks(parts):
        index = nearest(values, centers[layer])
        for c in range(centers.shape[1]):
            chosen = values[index == c]
            result[0, layer, c] += chosen.numel()
            result[1, layer, c] += chosen.sum(dtype=torch.float64)
    return result


def median_deviations(parts: Sequence[LayerPart], found: Clustered, reduce: Reduce) -> Medians:
    """Medians of |value - mean of its layer|, of each cluster and of all elements of the model.

    Exact: the lower of the middle two of an even number. The bits of a non-negative float32 are ordered as it is, so
    four rounds that count 8 bits each find the median's. Collective: four reductions of
    256 x (layers x clusters + 1) counts.
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
    """How often each value of the digit at `shift` follows the row's `prefix`, int64 (rows, 256)."""
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
