"""Columns of the sums that the intervals come from (`group_stats.GroupSums`)."""

from __future__ import annotations

BLOCK = 8
"""Samples of a block of release 0.4.0."""
BLOCK_COLUMNS = ("count", "snr", "mu2", "s2", "damping", "damping_corrected", "log_snr")
BLOCK_COLUMN = {name: index for index, name in enumerate(BLOCK_COLUMNS)}

VALUES = ("snr", "mu2", "s2", "damping", "damping_corrected", "step2", "step2_corrected", "below")
"""Columns of a replicate (`replicates`): sums over elements. below: those with at most the ratio's pilot median."""
VALUE = {name: index for index, name in enumerate(VALUES)}
CURVE = (-3.2, -1.6, -0.8, -0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Logarithms of the ratio over the pilot median, where the mean over the replicates of "below" is known too."""
PAIR = len(VALUES)
KEPT, ALL, BETWEEN = (slice(i * (PAIR + 1), (i + 1) * (PAIR + 1)) for i in range(3))
"""Columns of a group's spreads, for each value and for the product of mu2 and s2 (`PAIR`). KEPT: an element's variance
between the replicates, summed over the subsample with squared weights; ALL: the same for all elements; BETWEEN: squared
deviations of the elements from their mean."""
WEIGHT, CURVE_AT = 3 * (PAIR + 1), 3 * (PAIR + 1) + 1
"""The number of elements that the subsample represents, and the first of the values at `CURVE`."""
SPREADS = CURVE_AT + len(CURVE)
