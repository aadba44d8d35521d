"""Group sums of given gradient samples, by the code that the engines use."""

from __future__ import annotations

import torch
from torch import Tensor

from mols_ds.core.group_stats import GroupSums
from mols_ds.core.layout import ElementLayout
from mols_ds.core.local_stats import LocalStats
from mols_ds.core.ranges import ShardRange


def sums_of(samples: Tensor) -> GroupSums:
    """The sums of one group "vo" with all elements of (K, n) samples."""
    n = samples.shape[1]
    stats = LocalStats([ShardRange("w", 0, 0, n)], {"w": ElementLayout.whole("vo")}, ("vo",), torch.device("cpu"))
    for sample in samples:
        stats.open()
        stats.add(0, sample, 1.0)
        stats.close()
    return stats.gradient_sums()
