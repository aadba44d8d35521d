"""Cost of MoLS: bytes of the accumulators and messages of a calibration."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from mols_ds.core.accumulators import CPU_CHUNK, DEVICE_CHUNK
from mols_ds.core.group_stats import GroupSums, noise_floor
from mols_ds.core.host_copies import CHUNK_BYTES
from mols_ds.core.replicates import FEWEST, REPLICATES
from mols_ds.core.subsample import CELLS, ELEMENTS

Device = Literal["cpu", "accelerator"]
AGREEMENT = 8
"""Bytes of the all-reduce in which the ranks agree that a sample is usable."""


class AccumulatorBytes(NamedTuple):
    """Bytes on one rank during a calibration. kept: `engine.mols.accumulator_bytes`; scratch: of one update;
    samples: at most, for the intervals (`mols_ds.core.subsample`)."""

    kept: int
    scratch: int
    samples: int

    @property
    def total(self) -> int:
        return self.kept + self.scratch + self.samples


def accumulators(
    elements: int, device: Device, samples: int = CELLS, threads: int = 1, *, crosses: bool = False
) -> AccumulatorBytes:
    """Compute the accumulator bytes of a rank that measures `elements` elements (`mols_ds.core.accumulators`).

    kept: fp32 mean and squared deviations. samples: at most ELEMENTS elements with all samples, positions and groups.
    crosses: gradients go from the accelerator to the host, through the buffers of `mols_ds.core.host_copies`.
    """
    kept_samples = min(elements, ELEMENTS) * (4 * min(samples, 2 * CELLS) + 10)
    chunk = CPU_CHUNK * max(1, min(threads, 8) // 2) if device == "cpu" else DEVICE_CHUNK
    scratch = 4 * min(chunk, elements) + (2 * CHUNK_BYTES if crosses else 0)
    return AccumulatorBytes(8 * elements, scratch, kept_samples)


def sums_bytes(groups: tuple[str, ...], samples: int) -> int:
    """Return the bytes of the all-reduce at the end of a calibration: the packed group sums."""
    packed: torch.Tensor = GroupSums.zeros(groups, noise_floor(samples), REPLICATES if samples >= FEWEST else 0).pack()
    return packed.numel() * packed.element_size()
