"""Streaming per-element mean and squared deviation of K gradient samples over flat shards (Welford's method)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NotRequired, TypedDict, cast

import torch
from torch import Tensor

from mols_ds.core.exponents import MAX_EXPONENT, UNDECIDED, Exponents
from mols_ds.core.group_stats import BLOCK_COLUMNS, block_table
from mols_ds.core.host_copies import HostCopies
from mols_ds.errors import MolsCheckpointError, MolsConfigError, MolsError

STRIDE = 127  # prime: no common period with the rows of a matrix; adds 9 / 127 bytes an element, 0.9 % of 8
# Elements per chunk on the CPU: its 4 arrays of 1 MiB fit the last-level cache. Measured: from 32k to 256k elements
# the rate rose from 0.82 to 1.1 times a copy's, then no more.
CPU_CHUNK = 1 << 18
SMALL, GATHERED = 1 << 14, 1 << 16  # elements: pieces up to SMALL are joined until GATHERED elements are together
DEVICE_CHUNK = 1 << 24  # elements: on an accelerator a few large kernels, and 64 MiB of scratch
ACCUMULATORS = (torch.float32, torch.float64)
OF_LATER_RELEASES = 2
"""Number of the last columns of block sums that release 0.4.0 did not have."""


def subsample(offset: int, numel: int) -> tuple[int, int, int]:
    """Select the elements of [offset, offset + numel) that feed the sample blocks: multiples of STRIDE.

    Returns:
        (first, index, count): the elements first, first + STRIDE, ... relative to `offset`; their first index in the
        block arrays; their number.
    """
    first = -offset % STRIDE
    count = max(0, -(-(numel - first) // STRIDE))
    return first, (offset + first) // STRIDE, count


def welford(mean: Tensor, m2: Tensor, value: Tensor, k: int, scratch: Tensor | None = None) -> None:
    """Update mean and m2 in place with the k-th value (1-based). `scratch` may be `value`, which is overwritten."""
    if k == 1:
        mean.copy_(value)
        m2.zero_()
        return
    delta = torch.sub(value, mean, out=scratch)
    mean.add_(delta, alpha=1.0 / k)
    m2.addcmul_(delta, delta, value=(k - 1) / k)


class AccumulatorsState(TypedDict):
    """State of `Accumulators` in a checkpoint: its tensors and their sizes."""

    numel: int
    count: int
    block_length: int
    mean: Tensor
    m2: Tensor
    block_mean: Tensor
    block_m2: Tensor
    block_sums: Tensor
    exponents: NotRequired[Tensor]


PER_ELEMENT: tuple[Literal["mean", "m2", "block_mean", "block_m2"], ...] = ("mean", "m2", "block_mean", "block_m2")
SIZES: tuple[Literal["numel", "block_length"], ...] = ("numel", "block_length")


class Accumulators:
    """Accumulate mean and M2 = sum_k (g_k - mean)^2 of `numel` elements over gradient samples (Welford's method).

    Update for sample k: d = g - mean; mean += d / k; M2 += d^2 (k-1)/k. This equals the usual d * (g - new mean), and
    M2 never falls. An element that is zero in every sample keeps mean = M2 = 0 exactly; a constant element keeps
    M2 = 0 exactly. Arithmetic is in the accumulators' dtype (fp32); 16-bit gradients are converted first.

    Ranges of very small or large gradients are scaled by a power of two (`Exponents`): mean then holds 2^e times the
    true value, M2 4^e times. An element far below the largest of its range still loses its square to underflow and
    counts as "constant" (`group_stats.COLUMNS`).

    Every STRIDE-th element also feeds a second pair of accumulators, over blocks of `block_length` samples. A finished
    block appends its per-group sums (`group_stats.block_table`) to `block_sums` and starts over. The intervals come
    from the spread between blocks. All accumulators together take 8.07 bytes an element.

    Attributes:
        mean, m2: 1-D, `numel` elements on `device`. The variance is m2 / (count - 1); readers compute it per chunk.
        count: number of finished samples.
        block_sums: one float64 (n_groups, len(BLOCK_COLUMNS)) CPU tensor per finished block.
    """

    def __init__(
        self,
        numel: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        group_index: Tensor | None = None,
        n_groups: int = 0,
        block_length: int = 8,
        edges: Sequence[int] = (),
    ) -> None:
        """Create accumulators of zeros.

        Args:
            numel: elements that this rank owns; may be 0.
            device: of the accumulators; gradients may come from another device.
            dtype: float32, or float64 for reference computations.
            group_index: uint8 or int16, 1-D, ceil(numel / STRIDE) elements: the group row of elements 0, STRIDE, ...
                None: no sample blocks, hence no intervals.
            n_groups: rows of the block sums.
            block_length: samples per block, at least 4 for the noise-floor correction.
            edges: ranges that have their own exponents (`Exponents`); () = every exponent is 0.

        Raises:
            MolsConfigError: a 16-bit dtype, or a block that is too short.
            MolsError: a `group_index` of another dtype or shape.
        """
        if dtype not in ACCUMULATORS:
            raise MolsConfigError(f"accumulators.dtype={dtype}: 16-bit accumulators lose the variance; use float32")
        if block_length < 4:
            raise MolsConfigError(f"block_length={block_length}: a sample block needs at least 4 samples")
        self.numel, self.device, self.dtype = numel, torch.device(device), dtype
        self.block_length, self.n_groups = block_length, n_groups
        self.mean, self.m2 = self._zeros(numel), self._zeros(numel)
        self.device = self.mean.device  # "cuda" became "cuda:0", so that it equals the gradients' device
        self.count = 0
        self.exponents = Exponents(edges)
        self.block_sums: list[Tensor] = []
        self._group_index: Tensor | None = None
        self._block_mean, self._block_m2 = self._zeros(0), self._zeros(0)
        if group_index is not None:
            size = subsample(0, numel)[2]
            if group_index.shape != (size,) or group_index.dtype not in (torch.uint8, torch.int16):
                raise MolsError(f"group_index must be uint8 or int16 of shape ({size},), not {_kind(group_index)}")
            self._group_index = group_index.to(self.device)
            self._block_mean, self._block_m2 = self._zeros(size), self._zeros(size)
        threads = min(torch.get_num_threads(), 8)
        self._chunk = CPU_CHUNK * max(1, threads // 2) if self.device.type == "cpu" else DEVICE_CHUNK
        self._scratch: Tensor | None = None
        self._copies = HostCopies()
        self._small: list[Tensor] = []  # fp32 copies of small adjacent pieces, accumulated together
        self._small_offset = self._small_numel = 0
        self._pieces: list[tuple[int, int]] | None = None
        self._freed = False

    def open(self) -> None:
        """Begin a gradient sample. Raises `MolsError` if one is open or the accumulators were freed."""
        self._alive()
        if self._pieces is not None:
            raise MolsError("a gradient sample is open already: close() or abort() it first")
        self._pieces = []

    @torch.no_grad()
    def update(self, offset: int, grad: Tensor, scale: float = 1.0) -> None:
        """Accumulate grad * scale into elements [offset, offset + grad.numel()) of the open sample.

        Check for non-finite gradients before the first update of a sample: an update cannot be undone.

        Args:
            offset: first element.
            grad: 1-D, any float dtype, stride and device; not modified. From another device it is copied in chunks
                (`HostCopies`). It may change as soon as this returns.
            scale: for example 1 / loss scale. The product is rounded once, to the accumulators' dtype.

        Raises:
            MolsError: no open sample, or a piece that does not fit.
        """
        if self._pieces is None:
            raise MolsError("update() without an open gradient sample: call open() first")
        numel = grad.numel()
        if grad.dim() != 1 or not grad.is_floating_point():
            raise MolsError(f"a gradient piece must be a 1-D float tensor, not {_kind(grad)}")
        if offset < 0 or offset + numel > self.numel:
            raise MolsError(f"gradient piece [{offset}, {offset + numel}) exceeds the {self.numel} owned elements")
        self._pieces.append((offset, numel))
        if grad.device == self.device:
            self._gather(offset, grad.detach(), scale)
            return
        if self.device.type == "cpu":
            for start, piece in self._copies.chunks(grad.detach()):
                self._gather(offset + start, piece, scale)
            return
        for start in range(0, numel, DEVICE_CHUNK):
            piece = grad[start : start + DEVICE_CHUNK].detach().to(self.device)
            self._gather(offset + start, piece, scale)

    def close(self) -> None:
        """Finish the open sample. Raises `MolsError` unless its updates covered every element exactly once."""
        if self._pieces is None:
            raise MolsError("close() without an open gradient sample")
        self._flush()
        end = 0
        for offset, numel in [*sorted(piece for piece in self._pieces if piece[1] > 0), (self.numel, 0)]:
            if offset != end:
                what = "missed" if offset > end else "updated twice"
                span = f"[{min(offset, end)}, {max(offset, end)})"
                raise MolsError(f"elements {span} were {what} in gradient sample {self.count + 1}")
            end = offset + numel
        self._pieces = None
        self.count += 1
        for begin, end, exponent in self.exponents.decide(self.mean):
            self._rescale(begin, end, exponent)
        if self._group_index is not None and self.count % self.block_length == 0:
            self.block_sums.append(self._block_table(self._group_index))

    @torch.no_grad()
    def _rescale(self, begin: int, end: int, exponent: int) -> None:
        """Scale a range whose first non-zero gradient is this sample's. Recompute its M2, which fp32 may have lost.

        The k-th sample is g, the earlier ones are 0: mean = g / k, M2 = g^2 (k - 1) / k = mean^2 k (k - 1).
        """
        pairs = [(self.mean[begin:end], self.m2[begin:end], self.count)]
        if self._group_index is not None:
            _, at, count = subsample(begin, end - begin)
            block = self._block_mean[at : at + count], self._block_m2[at : at + count]
            pairs.append((*block, (self.count - 1) % self.block_length + 1))
        for mean, m2, k in pairs:
            mean.mul_(2.0**exponent)
            torch.mul(mean, mean, out=m2).mul_(k * (k - 1))

    def _block_table(self, group_index: Tensor) -> Tensor:
        """Compute the per-group sums of the finished block."""
        tables = []
        for begin, end, exponent in self.exponents.parts(0, self.numel):
            _, at, count = subsample(begin, end - begin)
            mean, m2, index = (values[at : at + count] for values in (self._block_mean, self._block_m2, group_index))
            tables.append(block_table(mean, m2, self.block_length, index, self.n_groups, exponent))
        return tables[0] if len(tables) == 1 else torch.stack(tables).sum(0)

    def abort(self) -> None:
        """Discard the open sample. Raises `MolsError` after an update: accumulators cannot undo it."""
        if self._pieces:
            raise MolsError("an updated gradient sample cannot be dropped: check it before its first update")
        self._pieces = None

    @property
    def nbytes(self) -> int:
        """Bytes of all accumulators, sample blocks and group index; without the scratch buffer."""
        tensors = [self.mean, self.m2, self._block_mean, self._block_m2]
        if self._group_index is not None:
            tensors.append(self._group_index)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def free(self) -> None:
        """Release all memory. `count` and `block_sums` stay; every other use raises `MolsError` from now on."""
        self.mean = self.m2 = self._block_mean = self._block_m2 = torch.empty(0, device="cpu")
        self._group_index = self._scratch = self._pieces = None
        self._small, self._small_numel = [], 0
        self._copies = HostCopies()
        self._freed = True

    def state_dict(self) -> AccumulatorsState:
        """Return the accumulators (not copies) and their sizes. Raises `MolsError` inside a sample."""
        self._alive()
        if self._pieces is not None:
            raise MolsError("state_dict() inside a gradient sample: call close() or abort() first")
        none = torch.zeros(0, self.n_groups, len(BLOCK_COLUMNS), dtype=torch.float64, device="cpu")
        return {
            "numel": self.numel,
            "count": self.count,
            "block_length": self.block_length,
            "mean": self.mean,
            "m2": self.m2,
            "block_mean": self._block_mean,
            "block_m2": self._block_m2,
            "block_sums": torch.stack(self.block_sums) if self.block_sums else none,
            "exponents": self.exponents.state(),
        }

    def load_state_dict(self, state: object) -> None:
        """Copy a `state_dict` bit for bit. Raises `MolsCheckpointError` where sizes, dtypes or groups differ."""
        self._alive()
        mine = self.state_dict()
        theirs = _checked(state, mine)
        blocks = theirs["block_sums"]
        if self._group_index is not None and len(blocks) != theirs["count"] // self.block_length:
            raise MolsCheckpointError(f"the state has {len(blocks)} sample blocks of {theirs['count']} samples")
        for key in PER_ELEMENT:
            mine[key].copy_(theirs[key])
        self.block_sums = [table.clone() for table in blocks.cpu()]
        if "exponents" in theirs:
            self.exponents.load(theirs["exponents"])
        else:  # release 0.4.0
            self.exponents.load_nothing(self.mean, self.m2)
        self.count = theirs["count"]

    def _zeros(self, numel: int) -> Tensor:
        return torch.zeros(numel, dtype=self.dtype, device=self.device)

    def _alive(self) -> None:
        if self._freed:
            raise MolsError("the accumulators were freed after their calibration")

    def _gather(self, offset: int, grad: Tensor, scale: float) -> None:
        """Accumulate a piece. Join small pieces first: their kernel launches would cost more than the arithmetic.

        The arithmetic of an element does not depend on its piece, so results do not change.
        """
        numel = grad.numel()
        if self._small and (offset != self._small_offset + self._small_numel or numel > SMALL):
            self._flush()
        if numel > SMALL:
            self._accumulate(offset, grad, scale)
            return
        if not self._small:
            self._small_offset = offset
        value = grad.to(self.dtype)
        self._small.append(value * scale if scale != 1.0 else value.clone() if value is grad else value)
        self._small_numel += numel
        if self._small_numel >= GATHERED:
            self._flush()

    def _flush(self) -> None:
        """Accumulate the pending small pieces."""
        if self._small:
            small, self._small, self._small_numel = self._small, [], 0
            self._accumulate(self._small_offset, torch.cat(small) if len(small) > 1 else small[0], 1.0)

    def _accumulate(self, offset: int, grad: Tensor, scale: float) -> None:
        """Run one Welford step on a piece that is on the accumulators' device."""
        numel = grad.numel()
        if self._group_index is not None:
            for begin in range(0, numel, DEVICE_CHUNK):
                self._accumulate_block(offset + begin, grad[begin : begin + DEVICE_CHUNK], scale)
        if self._scratch is None:
            self._scratch = torch.empty(min(self._chunk, self.numel), dtype=self.dtype, device=self.device)
        for begin, end, exponent in self.exponents.parts(offset, numel):
            part = grad[begin - offset : end - offset]
            self._accumulate_part(begin, part, scale * 2.0**exponent, self._scratch)

    def _accumulate_part(self, offset: int, grad: Tensor, scale: float, buffer: Tensor) -> None:
        """Run one Welford step on elements with one common exponent, which `scale` includes."""
        for at in range(0, grad.numel(), self._chunk):
            chunk = grad[at : at + self._chunk]
            begin, end = offset + at, offset + at + chunk.numel()
            mean, m2 = self.mean[begin:end], self.m2[begin:end]
            scratch = buffer[: chunk.numel()]
            if chunk.dtype != self.dtype:  # convert first: a 16-bit product would be rounded to 16 bits
                chunk = scratch.copy_(chunk)
            if scale != 1.0:
                chunk = torch.mul(chunk, scale, out=scratch)
            welford(mean, m2, chunk, self.count + 1, scratch)

    def _accumulate_block(self, offset: int, grad: Tensor, scale: float) -> None:
        """Run one Welford step on the elements that feed the sample blocks."""
        for begin, end, exponent in self.exponents.parts(offset, grad.numel()):
            first, at, count = subsample(begin, end - begin)
            if count:
                part = grad[begin - offset : end - offset]
                value = part[first::STRIDE].to(self.dtype) * (scale * 2.0**exponent)
                k = self.count % self.block_length + 1
                welford(self._block_mean[at : at + count], self._block_m2[at : at + count], value, k)


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _checked(state: object, mine: AccumulatorsState) -> AccumulatorsState:
    """Return `state` if its sizes, dtypes and groups equal those of `mine`. Raises `MolsCheckpointError`."""
    if not isinstance(state, Mapping):
        raise MolsCheckpointError(f"the state of the accumulators is a {type(state).__name__}")
    missing = [key for key in mine if key not in state and key != "exponents"]  # release 0.4.0 has no exponents
    if missing:
        raise MolsCheckpointError(f"the state of the accumulators lacks {', '.join(missing)}")
    for number in (*SIZES, "count"):
        if type(state[number]) is not int or state[number] < 0:
            raise MolsCheckpointError(f"the state of the accumulators has {number}={state[number]!r}, no count")
    for name in (*PER_ELEMENT, "block_sums"):
        if not isinstance(state[name], Tensor):
            raise MolsCheckpointError(f"the accumulators' {name!r} is a {type(state[name]).__name__}, not a tensor")
    theirs = cast(AccumulatorsState, state)
    for size in SIZES:
        if theirs[size] != mine[size]:
            raise MolsCheckpointError(f"the state of the accumulators has {size}={theirs[size]}, this run {mine[size]}")
    for key in PER_ELEMENT:
        if theirs[key].shape != mine[key].shape or theirs[key].dtype != mine[key].dtype:
            raise MolsCheckpointError(f"the accumulators' {key!r} is {_kind(theirs[key])}, not {_kind(mine[key])}")
    missing_columns = mine["block_sums"].shape[-1] - theirs["block_sums"].shape[-1]
    if missing_columns == OF_LATER_RELEASES:  # release 0.4.0: unknown, so that `step_rms` has no interval
        unknown = torch.nn.functional.pad(theirs["block_sums"], (0, missing_columns), value=torch.nan)
        theirs = cast(AccumulatorsState, {**theirs, "block_sums": unknown})
    blocks, ours = theirs["block_sums"], mine["block_sums"]
    if blocks.shape[1:] != ours.shape[1:] or blocks.dtype != ours.dtype:
        raise MolsCheckpointError("the sample blocks in the state are of other groups than this run's")
    exponents = theirs.get("exponents", mine["exponents"])
    if not isinstance(exponents, Tensor) or _kind(exponents) != _kind(mine["exponents"]):
        raise MolsCheckpointError(f"the accumulators' 'exponents' are not {_kind(mine['exponents'])}")
    if not bool(((exponents.abs() <= MAX_EXPONENT) | (exponents == UNDECIDED)).all()):
        raise MolsCheckpointError(f"the accumulators' 'exponents' are not in -{MAX_EXPONENT} to {MAX_EXPONENT}")
    return theirs
