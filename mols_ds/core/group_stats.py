"""Per-group sums of per-element gradient statistics, made global by one small SUM all-reduce.

Names follow arXiv 2605.05794. For element i, mu_i is the mean and s_i^2 the variance of its K gradient samples,
SNR_i = mu_i^2 / s_i^2, and d_i = |mu_i| / sqrt(mu_i^2 + s_i^2) is the effective signal step of eq. 4. "Ratio" is the
uncorrected SNR_i. All sums are float64 and additive over disjoint elements, so the result does not depend on the
number of ranks (counts and bins exactly, other sums up to float64 rounding).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mols_ds.core.columns import BLOCK_COLUMNS, SPREADS, VALUES
from mols_ds.core.layout import ElementLayout
from mols_ds.errors import MolsConfigError, MolsError

COLUMNS = (
    "count",  # elements with s^2 > 0: only these enter an estimator
    "snr",
    "snr_squared",
    "mu2",
    "s2",
    "damping",
    "damping_corrected",
    "step2",
    "step2_corrected",
    "never_moved",  # s^2 == 0 and mu == 0
    "constant",  # s^2 == 0 and mu != 0, also where the fp32 square underflowed: not in the estimators
    "moved_once",  # exactly one of K samples is non-zero; included in "count"
    "unseen",  # in a row whose token did not occur (`vocabulary`), moved or not: not in the estimators
    "left_out",  # of "unseen": not in "never_moved"
    "total",
)
COLUMN = {name: index for index, name in enumerate(COLUMNS)}

BINS_PER_OCTAVE = 70  # 2 ** (1 / 70) = 1.00995: the relative width of a bin, at most 1 %
OCTAVES = 30  # the bins cover SNR_i from 2 ** -30 (9e-10) to 2 ** 30 (1e9), with one bin below and one above
N_EDGES = 2 * OCTAVES * BINS_PER_OCTAVE + 1
N_BINS = N_EDGES + 1
LOG_ERROR = 1e-6  # bins: far above the rounding of 70 * (log2 + 30), which is 1e-12, and far below one bin

# For an element that moved in one sample, K * ratio is 1 up to fp32 rounding: 9e-7 for K = 32, 9e-6 for K = 2,048.
# Of the other elements at most one in 200,000 is mistaken for one: 2e-5 times the density of F(1, K-1) at 1, 0.24.
MOVED_ONCE_RTOL = 1e-5
LOST = 2.0**-140  # of a sample's square: below, fp32 rounds too coarsely, see `variance`
CHUNK = 65536  # elements: the float64 temporaries of one chunk stay in the last-level cache


class NoiseFloor(NamedTuple):
    """Correction of the plain ratio's bias: corrected SNR_i = shrink * ratio_i - floor."""

    shrink: float
    floor: float


def noise_floor(samples: int) -> NoiseFloor:
    """Return the noise floor of K samples: for Gaussian noise, K * ratio is noncentral F(1, K-1).

    Args:
        samples: K.

    Returns:
        shrink (K-3)/(K-1), floor 1/K. The expectation exists for K > 3: else shrink is 0, and `estimators` refuses to
        correct.

    Raises:
        MolsConfigError: K < 1.
    """
    if samples < 1:
        raise MolsConfigError(f"samples={samples}: at least 1 gradient sample is needed for a noise floor")
    return NoiseFloor((samples - 3) / (samples - 1) if samples > 3 else 0.0, 1.0 / samples)


def bin_edge(position: float) -> float:
    """Return edge number `position`: 2 ** ((position + 1/2) / 70 - 30). A fraction is inside a bin, geometrically.

    Edges avoid powers of two by half a bin: an element that moved in one of K samples reads exactly 1/K. At an edge,
    rounding would choose its bin, and the median would depend on the number of ranks.
    """
    return float(2.0 ** ((position + 0.5) / BINS_PER_OCTAVE - OCTAVES))


def bin_edges() -> Tensor:
    """The `N_EDGES` edges, float64 on the CPU. Bin j is edges[j-1] <= SNR_i < edges[j]. Same bits on every rank."""
    return torch.tensor([bin_edge(j) for j in range(N_EDGES)], dtype=torch.float64, device="cpu")


def find_bins(ratio: Tensor) -> Tensor:
    """Return the bin of each ratio. Equals `torch.bucketize(ratio, bin_edges(), right=True)` in a seventh of its time.

    The last bit of a logarithm can depend on an element's place in a vector, and so on the number of ranks. So the
    logarithm gives the right bin or one too low, and a comparison with that bin's upper edge decides.

    Args:
        ratio: 1-D float64 >= 0 without NaN, any device. Infinity is in the last bin.

    Returns:
        int64 of that shape.
    """
    position = ratio.log2().add_(OCTAVES).mul_(BINS_PER_OCTAVE).add_(0.5 - LOG_ERROR)
    bins = position.clamp_(0, N_EDGES).to(torch.int64)
    return bins.add_(ratio >= _upper_edges(ratio.device).index_select(0, bins))


class GroupSums:
    """Additive statistics of module groups.

    Attributes:
        groups: group names, in the row order of every tensor here; the same on every rank.
        floor: noise floor of the corrected columns.
        table: float64 (G, len(COLUMNS)) on the CPU.
        histogram: float64 (G, N_BINS) on the CPU: counts of the ratio SNR_i in logarithmic bins.
        replicates: float64 (R, G, len(VALUES)) on the CPU, see `replicates`. R = 0: no intervals.
        spreads: float64 (G, SPREADS) on the CPU, of the replicates.
        blocks: float64 (B, G, len(BLOCK_COLUMNS)) on the CPU: sample blocks of release 0.4.0 (`sample_blocks`).
    """

    def __init__(
        self,
        groups: Sequence[str],
        floor: NoiseFloor,
        table: Tensor,
        histogram: Tensor,
        replicates: Tensor,
        spreads: Tensor,
        blocks: Tensor,
    ) -> None:
        """Use existing tensors; `zeros` creates new ones. Raises `MolsError` for a duplicate group."""
        self.groups = tuple(groups)
        self.floor = floor
        self.table = table
        self.histogram = histogram
        self.replicates = replicates
        self.spreads = spreads
        self.blocks = blocks
        self._row = {group: row for row, group in enumerate(self.groups)}
        if len(self._row) != len(self.groups):
            raise MolsError(f"groups={self.groups}: a group is listed twice")

    @classmethod
    def zeros(cls, groups: Sequence[str], floor: NoiseFloor, replicates: int = 0, blocks: int = 0) -> GroupSums:
        """Create sums of zero.

        Args:
            groups: names, each once.
            floor: `noise_floor` of the samples.
            replicates: number of results from half samples; 0: no intervals.
            blocks: number of sample blocks (release 0.4.0's intervals).
        """
        size, f64 = len(groups), torch.float64
        return cls(
            groups,
            floor,
            torch.zeros(size, len(COLUMNS), dtype=f64, device="cpu"),
            torch.zeros(size, N_BINS, dtype=f64, device="cpu"),
            torch.zeros(replicates, size, len(VALUES), dtype=f64, device="cpu"),
            torch.zeros(size, SPREADS if replicates else 0, dtype=f64, device="cpu"),
            torch.zeros(blocks, size, len(BLOCK_COLUMNS), dtype=f64, device="cpu"),
        )

    def add(self, group: str, mean: Tensor, m2: Tensor, samples: int, exponent: int = 0) -> None:
        """Add the elements of one group.

        Args:
            group: one of `groups`.
            mean: mu_i, a float view with 1 or 2 dimensions, any stride, any device.
            m2: shape of mean; the sum of squared deviations (`Accumulators.m2`), **not** the variance m2 / (K - 1).
            samples: K.
            exponent: e; mean holds 2^e times and m2 4^e times the true value.

        Raises:
            MolsConfigError: K < 2.
            MolsError: an unknown group, or shapes that do not fit.
        """
        if samples < 2:
            raise MolsConfigError(f"samples={samples}: a variance needs at least 2 gradient samples; raise 'samples'")
        row = self._check(group, mean, m2)
        for mean_c, m2_c in _chunks(mean, m2):
            mu = unscaled(mean_c, exponent)
            self._accumulate(row, mu * mu, variance(m2_c, samples, exponent), samples)

    def leave_out(self, group: str, mean: Tensor, m2: Tensor) -> None:
        """Count elements of rows whose token did not occur. Arguments as in `add` or `add_squares`, 1-D."""
        line = self.table[self._check(group, mean, m2)]
        still = int(((mean == 0) & (m2 == 0)).sum())
        line[COLUMN["never_moved"]] += still
        line[COLUMN["unseen"]] += mean.numel()
        line[COLUMN["left_out"]] += mean.numel() - still
        line[COLUMN["total"]] += mean.numel()

    def add_squares(self, group: str, mu2: Tensor, s2: Tensor) -> None:
        """Add elements given as squares: plain mu_i^2 (noise included) and s_i^2, shapes as in `add`.

        For mode "moments" (`adam_moments`). Squares cannot show moved-once elements; that count stays 0.
        """
        row = self._check(group, mu2, s2)
        for mu2_c, s2_c in _chunks(mu2, s2):
            self._accumulate(row, mu2_c.to(torch.float64), s2_c.to(torch.float64), None)

    def add_range(
        self, layout: ElementLayout, start: int, mean: Tensor, m2: Tensor, samples: int, exponent: int = 0
    ) -> None:
        """Add elements [start, start + mean.numel()) of a layout. mean and m2 are 1-D; otherwise as `add`."""
        for (group, of_mean), (_, of_m2) in zip(layout.views(mean, start), layout.views(m2, start), strict=True):
            self.add(group, of_mean, of_m2, samples, exponent)

    def add_blocks(self, block_sums: Sequence[Tensor]) -> None:
        """Add one rank's sums of `SampleBlocks`. Raises `MolsError` for another number of blocks."""
        if len(block_sums) != self.blocks.shape[0]:
            raise MolsError(f"cannot add {len(block_sums)} sample blocks to sums of {self.blocks.shape[0]} blocks")
        for mine, other in zip(self.blocks, block_sums, strict=True):
            mine += other

    def add_replicates(self, row: int, replicates: Tensor, spreads: Tensor) -> None:
        """Add the result of `replicates.replicate` to a group."""
        self.replicates[:, row] += replicates
        self.spreads[row] += spreads

    def merge(self, other: GroupSums) -> None:
        """Add the sums of other elements. Raises `MolsError` if groups or floor differ."""
        if (self.groups, self.floor) != (other.groups, other.floor):
            raise MolsError("sums of different groups or noise floors cannot be merged")
        self.load_packed(self.pack() + other.pack())

    def combined(self, members: Sequence[str], name: str) -> GroupSums:
        """Return the sums of the union of some groups, as one group called `name`."""
        rows = [self._row[member] for member in members]
        return GroupSums(
            (name,),
            self.floor,
            self.table[rows].sum(0, keepdim=True),
            self.histogram[rows].sum(0, keepdim=True),
            self.replicates[:, rows].sum(1, keepdim=True),
            self.spreads[rows].sum(0, keepdim=True),
            self.blocks[:, rows].sum(1, keepdim=True),
        )

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.table, self.histogram, self.replicates, self.spreads, self.blocks

    def pack(self) -> Tensor:
        """Flatten all sums into one 1-D float64 CPU tensor for a SUM all-reduce: 217 kB for 6 groups."""
        return torch.cat([tensor.flatten() for tensor in self._tensors()])

    def load_packed(self, packed: Tensor) -> None:
        """Copy back a reduced `pack`. Raises `MolsError` for another size."""
        sizes = [tensor.numel() for tensor in self._tensors()]
        if packed.numel() != sum(sizes):
            raise MolsError(f"packed sums have {packed.numel()} numbers, these groups and replicates need {sum(sizes)}")
        flat = packed.detach().to("cpu", torch.float64)
        for mine, piece in zip(self._tensors(), torch.split(flat, sizes), strict=True):
            mine.copy_(piece.reshape(mine.shape))

    def column(self, name: str) -> dict[str, float]:
        """One column of the table, per group. `name`: one of `COLUMNS`."""
        values = self.table[:, COLUMN[name]].tolist()
        return dict(zip(self.groups, values, strict=True))

    def not_finite(self) -> dict[str, float]:
        """Number of elements per group with overflowed or NaN statistics. No estimator counts them."""
        seen = sum(self.table[:, COLUMN[name]] for name in ("count", "never_moved", "constant", "left_out"))
        return dict(zip(self.groups, (self.table[:, COLUMN["total"]] - seen).tolist(), strict=True))

    def _check(self, group: str, first: Tensor, second: Tensor) -> int:
        if first.shape != second.shape or first.dim() not in (1, 2):
            shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
            raise MolsError(f"group {group!r}: shapes {shapes} are not equal and of 1 or 2 dimensions")
        if group not in self._row:
            raise MolsError(f"group {group!r} is not one of {self.groups}")
        return self._row[group]

    @torch.no_grad()
    def _accumulate(self, row: int, mu2: Tensor, s2: Tensor, samples: int | None) -> None:
        """Add one chunk of 1-D float64 mu_i^2 and s_i^2 to a row."""
        total = mu2.numel()
        counted = (s2 > 0) & torch.isfinite(s2) & torch.isfinite(mu2)
        still = s2 == 0
        never = still & (mu2 == 0)
        # A NaN or infinite mean with s^2 == 0 is neither never-moved nor constant.
        constant = still & (mu2 > 0) & torch.isfinite(mu2)
        counts = torch.stack([counted.sum(), never.sum(), constant.sum()]).tolist()
        if counts[0] < total:
            mu2, s2 = mu2[counted], s2[counted]
        ratio = mu2 / s2
        damping, corrected = dampings(mu2, s2, ratio, self.floor)
        values = (ratio, ratio * ratio, mu2, s2, damping, corrected, *squared_steps(mu2, s2, self.floor.floor))
        sums = torch.stack([v.sum() for v in values]).cpu()
        line = self.table[row]
        line[COLUMN["count"]] += counts[0]
        line[COLUMN["snr"] : COLUMN["step2_corrected"] + 1] += sums
        line[COLUMN["never_moved"]] += counts[1]
        line[COLUMN["constant"]] += counts[2]
        line[COLUMN["total"]] += total
        if samples is not None:
            line[COLUMN["moved_once"]] += int(((ratio * samples - 1.0).abs() <= MOVED_ONCE_RTOL).sum())
        self.histogram[row] += torch.bincount(find_bins(ratio), minlength=N_BINS).cpu()


def unscaled(mean: Tensor, exponent: int) -> Tensor:
    """Return 2^-exponent times the means, float64, in the shape of `mean`."""
    wide = mean.to(torch.float64)
    return wide * 2.0**-exponent if exponent else wide


def variance(m2: Tensor, samples: int, exponent: int) -> Tensor:
    """Compute s_i^2; 0 where fp32 lost the squares.

    Below its normal range fp32 rounds each square to a multiple of 2^-149. K squares are accurate to 0.1 % from
    K 2^-140 on.

    Args:
        m2: 4^exponent times the sum of squared deviations, any float dtype.
        samples: K, at least 2.
        exponent: power of two that the gradients were multiplied by.

    Returns:
        float64, in the shape of `m2`.
    """
    s2 = m2.to(torch.float64)
    if m2.dtype == torch.float32:
        s2.masked_fill_(s2 < samples * LOST, 0.0)
    return (s2 * 4.0**-exponent if exponent else s2) / (samples - 1)


def dampings(mu2: Tensor, s2: Tensor, ratio: Tensor, floor: NoiseFloor) -> tuple[Tensor, Tensor]:
    """Compute the share of a full Adam step: sqrt(mu^2/(mu^2 + s^2)), and corrected sqrt(c/(1 + c)), c = max(0, SNR_i).

    Args:
        mu2, s2, ratio: mu_i^2, s_i^2 and mu_i^2/s_i^2, float64, equal shapes.
        floor: with which SNR_i = shrink * ratio - floor.

    Returns:
        (d_i, corrected d_i) in [0, 1], in the same shape.
    """
    c = (ratio * floor.shrink - floor.floor).clamp_(min=0.0)
    return (mu2 / (mu2 + s2)).sqrt_(), (c / (1.0 + c)).sqrt_()


def squared_steps(mu2: Tensor, s2: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Compute the square of the effective step: mu^2 / (mu^2 + s^2), and corrected 1 - s^2 / (mu^2 + (1 - floor) s^2).

    With K samples, floor = 1/K, the denominator is the mean of g_k^2: the corrected value is the adjusted R^2 of the
    K gradients against a constant (Ezekiel 1930). It is exactly 0 for an element that moved in one sample.

    Args:
        mu2, s2: mu_i^2 and s_i^2, float64, equal shapes.
        floor: 1/K.

    Returns:
        (d_i^2, corrected d_i^2) in the same shape. The second may be negative.
    """
    return mu2 / (mu2 + s2), (mu2 - floor * s2) / (mu2 + (1.0 - floor) * s2)


_UPPER_EDGES: dict[torch.device, Tensor] = {}


def _upper_edges(device: torch.device) -> Tensor:
    """Upper edge of every bin; NaN for the last one, so that every comparison is false."""
    if device not in _UPPER_EDGES:
        _UPPER_EDGES[device] = torch.cat([bin_edges(), bin_edges().new_full((1,), torch.nan)]).to(device)
    return _UPPER_EDGES[device]


def _chunks(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield 1-D chunks of at most CHUNK elements from two 1-D or 2-D views of equal shape, in a fixed order."""
    if first.dim() == 1:
        for start in range(0, first.numel(), CHUNK):
            yield first[start : start + CHUNK], second[start : start + CHUNK]
        return
    rows, width = first.shape
    if width == 0:
        return
    if width > CHUNK:
        for row in range(rows):
            yield from _chunks(first[row], second[row])
        return
    step = CHUNK // width
    for start in range(0, rows, step):
        yield first[start : start + step].reshape(-1), second[start : start + step].reshape(-1)
