"""What MoLS adds: bytes of the accumulators, messages, and time."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from mols_ds.core.accumulators import CPU_CHUNK, DEVICE_CHUNK, subsample
from mols_ds.core.group_stats import GroupSums, noise_floor

Device = Literal["cpu", "accelerator"]
BLOCK = 8
"""Samples of a block (`mols_ds.core.accumulators.Accumulators`)."""
AGREEMENT = 8
"""Bytes of the all-reduce by which the ranks agree whether a sample is usable."""


class AccumulatorBytes(NamedTuple):
    """Bytes on one rank while it calibrates. kept: what `engine.mols.accumulator_bytes` says; scratch: of one pass."""

    kept: int
    scratch: int

    @property
    def total(self) -> int:
        return self.kept + self.scratch


def accumulators(elements: int, device: Device, groups: int = 6, threads: int = 1) -> AccumulatorBytes:
    """Of a rank that measures `elements` elements (`mols_ds.core.accumulators`): fp32 mean and squared deviations, both
    again and a group number for every 127th element, and the scratch of one pass."""
    sampled = subsample(0, elements)[2]
    index = sampled * (1 if groups <= 255 else 2)
    chunk = CPU_CHUNK * max(1, min(threads, 8) // 2) if device == "cpu" else DEVICE_CHUNK
    return AccumulatorBytes(8 * elements + 8 * sampled + index, 4 * min(chunk, elements))


def sums_bytes(groups: tuple[str, ...], samples: int) -> int:
    """Bytes of the one all-reduce at the end of a calibration: the packed group sums."""
    packed: torch.Tensor = GroupSums.zeros(groups, noise_floor(samples), samples // BLOCK, BLOCK).pack()
    return packed.numel() * packed.element_size()
