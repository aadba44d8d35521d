"""Select the sequences of each step's global batch, and this rank's micro-batches of it.

The step number addresses a batch, not the number of batches drawn before. So all arms of a comparison see the same
batches, a resumed run continues at the exact sequence, and a calibration on other batches (the `probe` stream) shifts
nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mols_ds.errors import MolsConfigError
from mols_ds.training.token_files import Tokens

Stream = Literal["train", "probe"]
STREAMS: tuple[Stream, ...] = ("train", "probe")
MicroBatch = Any
"""A micro-batch of the arm's backend and task: int64 of shape (micro, length) for `task.NextTokens`."""


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Shape of a global batch: `micro` sequences of `length` tokens per forward pass, `accumulation` passes per step,
    for `rank` of `world` data-parallel ranks."""

    length: int
    micro: int
    accumulation: int
    rank: int
    world: int

    @property
    def sequences(self) -> int:
        """Sequences of a global batch."""
        return self.micro * self.accumulation * self.world

    @property
    def tokens(self) -> int:
        """Tokens of a global batch."""
        return self.sequences * self.length


class Batches(Protocol):
    """Source of batches for the training loop."""

    def step(self, stream: Stream, step: int) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of global batch `step` of a stream."""
        ...


class SequenceOrder:
    """The order of `count` sequences: a new permutation every epoch, from (seed, stream, epoch) alone."""

    def __init__(self, count: int, seed: int, stream: Stream) -> None:
        if count < 1:
            raise MolsConfigError(
                "the training text is shorter than one sequence: give more text or a smaller --seq-len"
            )
        self.count = count
        self._key = (seed, STREAMS.index(stream))
        self._permutation = lru_cache(maxsize=2)(self._draw)

    def _draw(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng((*self._key, epoch)).permutation(self.count)

    def indices(self, start: int, number: int) -> npt.NDArray[np.int64]:
        """Sequence indices at positions [start, start + number) of the infinite order."""
        return self.at(np.arange(start, start + number, dtype=np.int64))

    def at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sequence indices at positions of the infinite order."""
        epochs, offsets = np.divmod(positions, self.count)
        out = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            out[mine] = self._permutation(int(epoch))[offsets[mine]]
        return out


def sequences(tokens: Tokens, indices: npt.NDArray[np.int64], length: int) -> torch.Tensor:
    """Return packed sequences [i * length, (i + 1) * length) of a flat token array: int64 (len(indices), length)."""
    rows = [np.asarray(tokens[i * length : (i + 1) * length], dtype=np.int64) for i in indices]
    return torch.from_numpy(np.stack(rows))


class RowBatches(ABC):
    """See `Batches`. A source of sequences by their position in an infinite order, which the step determines."""

    streams: Sequence[RowBatches] = ()
    """The streamed sources, whose place in the data set a checkpoint saves (`mols_ds.training.streams`)."""

    def __init__(self, shape: BatchShape) -> None:
        self.shape = shape

    @abstractmethod
    def rows(self, stream: Stream, positions: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the sequences at ascending `positions`: int64 (len(positions), length)."""

    def position(self, step: int, pass_: int) -> int:
        """Position of a micro-batch's first sequence among those of all ranks: the sequences of a step do not depend on
        the number of ranks."""
        return step * self.shape.sequences + (pass_ * self.shape.world + self.shape.rank) * self.shape.micro

    def step(self, stream: Stream, step: int) -> Iterator[torch.Tensor]:
        """See `Batches`."""
        for pass_ in range(self.shape.accumulation):
            start = self.position(step, pass_)
            yield self.rows(stream, np.arange(start, start + self.shape.micro, dtype=np.int64))


class PackedBatches(RowBatches):
    """Batches of a token file. There is no state to save."""

    def __init__(self, tokens: Tokens, shape: BatchShape, seed: int) -> None:
        super().__init__(shape)
        self._tokens = tokens
        self._orders = {stream: SequenceOrder(len(tokens) // shape.length, seed, stream) for stream in STREAMS}

    def rows(self, stream: Stream, positions: npt.NDArray[np.int64]) -> torch.Tensor:
        """See `RowBatches`."""
        return sequences(self._tokens, self._orders[stream].at(positions), self.shape.length)


class MixedBatches(RowBatches):
    """Batches of several sources, each with its share of the sequences.

    Of each `BLOCK` sequences a source has a fixed number, in an order from (seed, stream, block) alone. So the position
    determines source and sequence, and there is no other state than that of the sources.
    """

    BLOCK = 1000

    def __init__(self, sources: Sequence[RowBatches], weights: Sequence[float], shape: BatchShape, seed: int) -> None:
        super().__init__(shape)
        self._sources = sources
        self.streams = [stream for source in sources for stream in source.streams]
        self._seed = (seed, shape.rank) if self.streams else (seed,)
        ends = np.rint(np.cumsum(weights) / np.sum(weights) * self.BLOCK).astype(np.int64)
        self._counts = np.diff(ends, prepend=0)
        if not self._counts.all():
            raise MolsConfigError(f"the weight of a source of the mixture is below 1/{self.BLOCK} of all: leave it out")

    def position(self, step: int, pass_: int) -> int:
        """See `RowBatches`."""
        return self._sources[0].position(step, pass_)

    def rows(self, stream: Stream, positions: npt.NDArray[np.int64]) -> torch.Tensor:
        """See `RowBatches`."""
        source, position = self.places(stream, positions)
        found = torch.empty((len(positions), self.shape.length), dtype=torch.int64)
        for number in np.unique(source):
            mine = source == number
            found[torch.from_numpy(mine)] = self._sources[number].rows(stream, position[mine])
        return found

    def places(self, stream: Stream, positions: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
        """Return the source of each position, and the position there."""
        blocks, offsets = np.divmod(positions, self.BLOCK)
        source, position = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks):
            key = (*self._seed, STREAMS.index(stream), int(block))
            order = np.random.default_rng(key).permutation(np.repeat(np.arange(len(self._counts)), self._counts))
            before = np.empty_like(order)
            for number, count in enumerate(self._counts):
                before[order == number] = np.arange(count)
            mine = blocks == block
            source[mine] = order[offsets[mine]]
            position[mine] = block * self._counts[source[mine]] + before[offsets[mine]]
        return source, position


def held_out_batches(tokens: Tokens, shape: BatchShape, limit: int | None) -> list[tuple[torch.Tensor, int]]:
    """Return this rank's micro-batches of the held-out sequences, in order, with the number of valid sequences in each.

    Every rank gets the same number of batches, so that no rank waits in a collective: the last sequence is repeated
    with count 0 to fill up.

    Raises:
        MolsConfigError: the held-out text is shorter than one sequence.
    """
    count = len(tokens) // shape.length
    if count < 1:
        raise MolsConfigError(
            f"the held-out text has {len(tokens)} tokens, fewer than one sequence of {shape.length}: "
            "give more text, a larger --eval-share or a smaller --seq-len"
        )
    count = min(count, limit) if limit else count
    batches = []
    for first in range(0, count, shape.micro * shape.world):
        start = first + shape.rank * shape.micro
        indices = np.arange(start, start + shape.micro, dtype=np.int64)
        valid = int(np.clip(count - start, 0, shape.micro))
        batches.append((sequences(tokens, np.minimum(indices, count - 1), shape.length), valid))
    return batches
