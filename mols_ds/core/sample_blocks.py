"""Sample blocks of release 0.4.0, for calibrations that one of its checkpoints began.

Every STRIDE-th element has a second pair of accumulators, over blocks of BLOCK samples. A finished block gives sums of
each group. The spread between the blocks gives the interval, with Student's t. It is too wide: a subsample has more
noise of elements, and a block more noise than all samples. `replicates` has what replaced it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from mols_ds.core.columns import BLOCK, BLOCK_COLUMNS
from mols_ds.core.exponents import Exponents
from mols_ds.core.group_stats import OCTAVES, dampings, noise_floor, unscaled, variance
from mols_ds.core.welford import squares_of_one, welford
from mols_ds.errors import MolsCheckpointError

STRIDE = 127
BLOCK_CHUNK = 1 << 17  # subsampled elements, of 17 M: about 25 MiB of float64 temporaries


class SampleBlocks:
    """Statistics of blocks of consecutive samples. Methods as of `Subsample`.

    Args:
        numel: elements of the accumulators.
        group_index: uint8 or int16, ceil(numel / STRIDE) elements: the group row of elements 0, STRIDE, ...
        groups: number of rows.
        device, dtype: of the accumulators.

    Attributes:
        sums: one float64 (groups, len(BLOCK_COLUMNS)) CPU tensor per finished block.
    """

    def __init__(self, numel: int, group_index: Tensor, groups: int, device: torch.device, dtype: torch.dtype) -> None:
        self.numel = numel
        self.group_index, self.groups = group_index.to(device), groups
        self.mean, self.m2 = (torch.zeros(group_index.numel(), dtype=dtype, device=device) for _ in range(2))
        self.sums: list[Tensor] = []

    def open(self, count: int) -> None:
        """Begin sample number `count`, from 0."""

    def add(self, offset: int, gradient: Tensor, scale: float, exponents: Exponents, count: int) -> None:
        """Add gradient * scale for elements [offset, offset + numel) of sample `count`."""
        for begin, end, exponent in exponents.parts(offset, gradient.numel()):
            first, at, number = subsample(begin, end - begin)
            if number:
                part = gradient[begin - offset : end - offset]
                value = part[first::STRIDE].to(self.mean.dtype) * (scale * 2.0**exponent)
                welford(self.mean[at : at + number], self.m2[at : at + number], value, count % BLOCK + 1)

    def close(self, count: int, exponents: Exponents) -> None:
        """End sample `count`. Sums a block that it completes."""
        if (count + 1) % BLOCK:
            return
        table = torch.zeros(self.groups, len(BLOCK_COLUMNS), dtype=torch.float64, device="cpu")
        for begin, end, exponent in exponents.parts(0, self.numel):
            _, at, number = subsample(begin, end - begin)
            mean, m2, index = (values[at : at + number] for values in (self.mean, self.m2, self.group_index))
            table += block_table(mean, m2, BLOCK, index, self.groups, exponent)
        self.sums.append(table)

    def rescale(self, begin: int, end: int, exponent: int, count: int) -> None:
        """Scale elements whose first non-zero gradient is that of sample `count`, see `Accumulators`."""
        _, at, number = subsample(begin, end - begin)
        mean = self.mean[at : at + number].mul_(2.0**exponent)
        squares_of_one(mean, self.m2[at : at + number], count % BLOCK + 1)

    def state(self, count: int) -> dict[str, int | Tensor]:
        """Return the blocks of `count` samples, not copies."""
        none = torch.zeros(0, self.groups, len(BLOCK_COLUMNS), dtype=torch.float64, device="cpu")
        sums = torch.stack(self.sums) if self.sums else none
        return {"block_length": BLOCK, "block_mean": self.mean, "block_m2": self.m2, "block_sums": sums}

    def load(self, state: Mapping[str, object], count: int) -> None:
        """Load a `state` of `count` samples. Raises `MolsCheckpointError` if it does not fit."""
        if state["block_length"] != BLOCK:
            raise MolsCheckpointError(f"the state has block_length={state['block_length']}, not {BLOCK}")
        size, columns = self.mean.numel(), len(BLOCK_COLUMNS)
        shapes = {"block_mean": (size,), "block_m2": (size,), "block_sums": (count // BLOCK, self.groups, columns)}
        for key, shape in shapes.items():
            saved, dtype = state[key], torch.float64 if key == "block_sums" else self.mean.dtype
            if not isinstance(saved, Tensor) or saved.shape != shape or saved.dtype != dtype:
                raise MolsCheckpointError(f"the accumulators' {key!r} is no {dtype} tensor of shape {shape}")
        mean, m2, sums = (cast(Tensor, state[key]) for key in shapes)
        self.mean.copy_(mean)
        self.m2.copy_(m2)
        self.sums = [table.clone() for table in sums.cpu()]


def subsample(offset: int, numel: int) -> tuple[int, int, int]:
    """Select the elements of [offset, offset + numel) that feed the sample blocks: multiples of STRIDE.

    Returns:
        (first, index, count): the elements first, first + STRIDE, ... relative to `offset`; their first index in the
        block arrays; their number.
    """
    first = -offset % STRIDE
    count = max(0, -(-(numel - first) // STRIDE))
    return first, (offset + first) // STRIDE, count


def block_table(
    mean: Tensor, m2: Tensor, samples: int, group_index: Tensor, n_groups: int, exponent: int = 0
) -> Tensor:
    """Sum one sample block over the subsampled elements.

    Args:
        mean, m2: 1-D; mean and sum of squared deviations of the subsampled elements within the block.
        samples: block length L, at least 4; "damping_corrected" uses the noise floor of L samples.
        group_index: integer, 1-D of the same length: each element's row.
        n_groups: rows of the result.
        exponent: as in `GroupSums.add`.

    Returns:
        float64 (n_groups, len(BLOCK_COLUMNS)) on the CPU.
    """
    table = torch.zeros(n_groups, len(BLOCK_COLUMNS), dtype=torch.float64, device=mean.device)
    floor = noise_floor(samples)
    # In chunks: for all elements at once, the temporaries would take an eighth of the accumulators' memory.
    pieces = (torch.split(whole, BLOCK_CHUNK) for whole in (mean, m2, group_index))
    for mean_c, m2_c, index in zip(*pieces, strict=True):
        mu, s2 = unscaled(mean_c, exponent), variance(m2_c, samples, exponent)
        counted = (s2 > 0) & torch.isfinite(s2) & torch.isfinite(mu)
        mu, s2, index = mu[counted], s2[counted], index.to(torch.int64)[counted]
        mu2 = mu * mu
        ratio = mu2 / s2
        damping, corrected = dampings(mu2, s2, ratio, floor)
        # mu = 0 with s^2 > 0 has no logarithm: use the histogram's lowest edge.
        logs = ratio.clamp(min=2.0**-OCTAVES).log()
        values = torch.stack([torch.ones_like(ratio), ratio, mu2, s2, damping, corrected, logs], dim=1)
        table.index_add_(0, index, values)
    return table.cpu()
