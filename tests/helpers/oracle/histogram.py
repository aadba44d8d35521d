"""The median as the product documents it: logarithmic bins of fixed edges, interpolated inside the bin. float64, naive.

The edges are 2^((j + 1/2)/70), so a bin is 0.995 % wide, from 2^-30 to 2^30; 1/K is no edge.
"""

from __future__ import annotations

import math

from torch import Tensor

BINS_PER_OCTAVE, OCTAVES = 70, 30


def histogram_median(snr: Tensor) -> float:
    """The mean of the two middle elements (of the middle one twice), each placed within its bin by its rank."""
    counts: dict[int, int] = {}
    for value in snr.tolist():
        j = math.floor(BINS_PER_OCTAVE * math.log2(value) - 0.5) if value > 0 else -BINS_PER_OCTAVE * OCTAVES - 1
        counts[j] = counts.get(j, 0) + 1
    n = snr.numel()
    return (_ranked(counts, (n - 1) // 2) + _ranked(counts, n // 2)) / 2


def _ranked(counts: dict[int, int], rank: int) -> float:
    """The element at 0-based `rank`; the n elements of a bin stand at (1/2, 3/2, ...)/n of its logarithmic width."""
    below = 0
    for j in sorted(counts):
        if rank < below + counts[j]:
            return float(2.0 ** ((j + 0.5 + (rank - below + 0.5) / counts[j]) / BINS_PER_OCTAVE))
        below += counts[j]
    raise AssertionError("a rank beyond the elements")


def median_bounds(snr: Tensor, rtol: float) -> tuple[float, float]:
    """The values that an implementation may give whose SNR_i are off by at most `rtol`, up to `rtol` on the result.

    An element within `rtol` of a bin's edge may be counted on either side of it. The histogram median grows with every
    element, so shifting all of them down or up bounds every mixture. Where no element is that close to the two edges
    that matter, which is nearly always, both bounds are the histogram median, `rtol` aside.
    """
    return histogram_median(snr * (1 - rtol)) * (1 - rtol), histogram_median(snr * (1 + rtol)) * (1 + rtol)
