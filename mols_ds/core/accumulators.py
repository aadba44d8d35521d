"""Streaming per-element mean and squared deviation of K gradient samples over flat shards (Welford's method)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from mols_ds.core.exponents import MAX_EXPONENT, UNDECIDED, Exponents
from mols_ds.core.host_copies import HostCopies
from mols_ds.core.welford import welford
from mols_ds.errors import MolsCheckpointError, MolsConfigError, MolsError

# Elements per chunk on the CPU: its 4 arrays of 1 MiB fit the last-level cache. Measured: from 32k to 256k elements
# the rate rose from 0.82 to 1.1 times a copy's, then no more.
CPU_CHUNK = 1 << 18
SMALL, GATHERED = 1 << 14, 1 << 16  # elements: pieces up to SMALL are joined until GATHERED elements are together
DEVICE_CHUNK = 1 << 24  # elements: on an accelerator a few large kernels, and 64 MiB of scratch
ACCUMULATORS = (torch.float32, torch.float64)

AccumulatorsState = dict[str, int | Tensor]
"""State in a checkpoint: numel, count, mean, m2, exponents (not in release 0.4.0), and that of `Accumulators.kept`."""


class Kept(Protocol):
    """What the intervals need of the samples: `Subsample`, or `SampleBlocks` of release 0.4.0. Samples count from 0."""

    def open(self, count: int) -> None: ...
    def add(self, offset: int, gradient: Tensor, scale: float, exponents: Exponents, count: int) -> None: ...
    def close(self, count: int, exponents: Exponents) -> None: ...
    def rescale(self, begin: int, end: int, exponent: int, count: int) -> None: ...
    def state(self, count: int) -> dict[str, int | Tensor]: ...
    def load(self, state: Mapping[str, object], count: int) -> None: ...


class Accumulators:
    """Accumulate mean and M2 = sum_k (g_k - mean)^2 of `numel` elements over gradient samples (Welford's method).

    Update for sample k: d = g - mean; mean += d / k; M2 += d^2 (k-1)/k. This equals the usual d * (g - new mean), and
    M2 never falls. An element that is zero in every sample keeps mean = M2 = 0 exactly; a constant element keeps
    M2 = 0 exactly. Arithmetic is in the accumulators' dtype (fp32); 16-bit gradients are converted first.

    Ranges of very small or large gradients are scaled by a power of two (`Exponents`): mean then holds 2^e times the
    true value, M2 4^e times. An element far below the largest of its range still loses its square to underflow and
    counts as "constant" (`group_stats.COLUMNS`).

    `kept` sees the same samples, for the intervals. All together take 8 bytes an element, and at most 8.25 MiB more.

    Attributes:
        mean, m2: 1-D, `numel` elements on `device`. The variance is m2 / (count - 1); readers compute it per chunk.
        count: number of finished samples.
        kept: a few elements with all their samples, or sample blocks of release 0.4.0. None: no intervals.
    """

    def __init__(
        self,
        numel: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        edges: Sequence[int] = (),
        kept: Kept | None = None,
    ) -> None:
        """Create accumulators of zeros.

        Args:
            numel: elements that this rank owns; may be 0.
            device: of the accumulators; gradients may come from another device.
            dtype: float32, or float64 for reference computations.
            edges: ranges that have their own exponents (`Exponents`); () = every exponent is 0.
            kept: of the same device and dtype, without a sample.

        Raises:
            MolsConfigError: a 16-bit dtype.
        """
        if dtype not in ACCUMULATORS:
            raise MolsConfigError(f"accumulators.dtype={dtype}: 16-bit accumulators lose the variance; use float32")
        self.numel, self.device, self.dtype = numel, torch.device(device), dtype
        self.mean, self.m2 = self._zeros(numel), self._zeros(numel)
        self.device = self.mean.device  # "cuda" became "cuda:0", so that it equals the gradients' device
        self.count = 0
        self.exponents = Exponents(edges)
        self.kept = kept
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
        if self.kept is not None:
            self.kept.open(self.count)

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
        if self.kept is not None:
            self.kept.close(self.count - 1, self.exponents)

    @torch.no_grad()
    def _rescale(self, begin: int, end: int, exponent: int) -> None:
        """Scale a range whose first non-zero gradient is this sample's. Recompute its M2, which fp32 may have lost.

        The k-th sample is g, the earlier ones are 0: mean = g / k, M2 = g^2 (k - 1) / k = mean^2 k (k - 1).
        """
        mean = self.mean[begin:end].mul_(2.0**exponent)
        torch.mul(mean, mean, out=self.m2[begin:end]).mul_(self.count * (self.count - 1))
        if self.kept is not None:
            self.kept.rescale(begin, end, exponent, self.count - 1)

    def abort(self) -> None:
        """Discard the open sample. Raises `MolsError` after an update: accumulators cannot undo it."""
        if self._pieces:
            raise MolsError("an updated gradient sample cannot be dropped: check it before its first update")
        self._pieces = None

    @property
    def nbytes(self) -> int:
        """Bytes of mean and m2; without the scratch buffer and `kept`."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.mean, self.m2))

    def free(self) -> None:
        """Release all memory. `count` stays; every other use raises `MolsError` from now on."""
        self.mean = self.m2 = torch.empty(0, device="cpu")
        self.kept = self._scratch = self._pieces = None
        self._small, self._small_numel = [], 0
        self._copies = HostCopies()
        self._freed = True

    def state_dict(self) -> AccumulatorsState:
        """Return the accumulators (not copies) and their sizes. Raises `MolsError` inside a sample."""
        self._alive()
        if self._pieces is not None:
            raise MolsError("state_dict() inside a gradient sample: call close() or abort() first")
        own: AccumulatorsState = {"numel": self.numel, "count": self.count, "mean": self.mean, "m2": self.m2}
        return (
            own | {"exponents": self.exponents.state()} | (self.kept.state(self.count) if self.kept is not None else {})
        )

    def load_state_dict(self, state: object) -> None:
        """Copy a `state_dict` bit for bit. Raises `MolsCheckpointError` where sizes, dtypes or groups differ."""
        self._alive()
        mine = self.state_dict()
        theirs = _checked(state, mine)
        count = cast(int, theirs["count"])
        if self.kept is not None:
            self.kept.load(theirs, count)
        self.mean.copy_(cast(Tensor, theirs["mean"]))
        self.m2.copy_(cast(Tensor, theirs["m2"]))
        if "exponents" in theirs:
            self.exponents.load(cast(Tensor, theirs["exponents"]))
        else:  # release 0.4.0
            self.exponents.load_nothing(self.mean, self.m2)
        self.count = count

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
        if self.kept is not None:
            self.kept.add(offset, grad, scale, self.exponents, self.count)
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


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _checked(state: object, mine: AccumulatorsState) -> AccumulatorsState:
    """Return `state` if its sizes and dtypes equal those of `mine`. Raises `MolsCheckpointError`."""
    if not isinstance(state, Mapping):
        raise MolsCheckpointError(f"the state of the accumulators is a {type(state).__name__}")
    missing = [key for key in mine if key not in state and key != "exponents"]  # release 0.4.0 has no exponents
    if missing:
        raise MolsCheckpointError(f"the state of the accumulators lacks {', '.join(missing)}")
    theirs = cast(AccumulatorsState, {"exponents": mine["exponents"]} | dict(state))
    if theirs["numel"] != mine["numel"]:
        raise MolsCheckpointError(
            f"the state of the accumulators has numel={theirs['numel']}, this run {mine['numel']}"
        )
    for key, own in mine.items():
        other = theirs[key]
        if not isinstance(own, Tensor):
            if type(other) is not int or other < 0:
                raise MolsCheckpointError(f"the state of the accumulators has {key}={other!r}, no count")
        elif not isinstance(other, Tensor) or (key in ("mean", "m2", "exponents") and _kind(other) != _kind(own)):
            kind = _kind(other) if isinstance(other, Tensor) else f"a {type(other).__name__}"
            raise MolsCheckpointError(f"the accumulators' {key!r} are not {_kind(own)} but {kind}")
    exponents = cast(Tensor, theirs["exponents"])
    if not bool(((exponents.abs() <= MAX_EXPONENT) | (exponents == UNDECIDED)).all()):
        raise MolsCheckpointError(f"the accumulators' 'exponents' are not in -{MAX_EXPONENT} to {MAX_EXPONENT}")
    return cast(AccumulatorsState, dict(state))
