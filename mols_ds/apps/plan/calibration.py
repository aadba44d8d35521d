"""Cost of MoLS: bytes of the accumulators and messages of a calibration."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from mols_ds.core.accumulators import CPU_CHUNK, DEVICE_CHUNK, subsample
from mols_ds.core.group_stats import GroupSums, noise_floor
from mols_ds.core.host_copies import CHUNK_BYTES

Device = Literal["cpu", "accelerator"]
BLOCK = 8
"""Samples per block (`mols_ds.core.accumulators.Accumulators`)."""
AGREEMENT = 8
"""Bytes of the all-reduce in which the ranks agree that a sample is usable."""


class AccumulatorBytes(NamedTuple):
    """Bytes on one rank during a calibration. kept: `engine.mols.accumulator_bytes`; scratch: of one update."""

    kept: int
    scratch: int

    @property
    def total(self) -> int:
        return self.kept + self.scratch


def accumulators(
    elements: int, device: Device, groups: int = 6, threads: int = 1, *, crosses: bool = False
) -> AccumulatorBytes:
    """Compute the accumulator bytes of a rank that measures `elements` elements (`mols_ds.core.accumulators`).

    fp32 mean and squared deviations; both again plus a group number for every 127th element; scratch of one update.
    crosses: gradients go from the accelerator to the host, through the buffers of `mols_ds.core.host_copies`.
    """
    sampled = subsample(0, elements)[2]
    index = sampled * (1 if groups <= 255 else 2)
    chunk = CPU_CHUNK * max(1, min(threads, 8) // 2) if device == "cpu" else DEVICE_CHUNK
    scratch = 4 * min(chunk, elements) + (2 * CHUNK_BYTES if crosses else 0)
    return AccumulatorBytes(8 * elements + 8 * sampled + index, scratch)


def sums_bytes(groups: tuple[str, ...], samples: int) -> int:
    """Return the bytes of the all-reduce at the end of a calibration: the packed group sums."""
    packed: torch.Tensor = GroupSums.zeros(groups, noise_floor(samples), samples // BLOCK, BLOCK).pack()
    return packed.numel() * packed.element_size()
