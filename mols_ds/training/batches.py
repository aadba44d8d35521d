"""Select the sequences of each step's global batch, and this rank's micro-batches of it.

The step number addresses a batch, not the number of batches drawn before. So all arms of a comparison see the same
batches, a resumed run continues at the exact sequence, and a calibration on other batches (the `probe` stream) shifts
nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mols_ds.errors import MolsConfigError
from mols_ds.training.sources import DataSpec, document_hash, hash_threshold, stream_documents
from mols_ds.training.tokens import Tokenizer, Tokens

Stream = Literal["train", "probe"]
STREAMS: tuple[Stream, ...] = ("train", "probe")
STREAM_DOCUMENTS = 64
"""Documents of a streamed source per tokenizer call."""
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
        positions = np.arange(start, start + number, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.count)
        out = np.empty(number, dtype=np.int64)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            out[mine] = self._permutation(int(epoch))[offsets[mine]]
        return out


def sequences(tokens: Tokens, indices: npt.NDArray[np.int64], length: int) -> torch.Tensor:
    """Return packed sequences [i * length, (i + 1) * length) of a flat token array: int64 (len(indices), length)."""
    rows = [np.asarray(tokens[i * length : (i + 1) * length], dtype=np.int64) for i in indices]
    return torch.from_numpy(np.stack(rows))


class PackedBatches:
    """Batches of a token file. The step is the position: there is no state to save."""

    def __init__(self, tokens: Tokens, shape: BatchShape, seed: int) -> None:
        self._tokens, self._shape = tokens, shape
        count = len(tokens) // shape.length
        self._orders = {stream: SequenceOrder(count, seed, stream) for stream in STREAMS}

    def step(self, stream: Stream, step: int) -> Iterator[torch.Tensor]:
        """See `Batches`. The sequences of a step do not depend on the number of ranks."""
        shape = self._shape
        for pass_ in range(shape.accumulation):
            start = step * shape.sequences + (pass_ * shape.world + shape.rank) * shape.micro
            indices = self._orders[stream].indices(start, shape.micro)
            yield sequences(self._tokens, indices, shape.length)


class StreamedBatches:
    """Batches of a streamed data set: this rank's part, shuffled, tokenized and packed while reading.

    A hash selects held-out documents. A stream only moves forward: for a later step than the next (a resumed run) it
    reads and drops the sequences between, which is exact for the same number of ranks. For an earlier step it restarts.
    """

    def __init__(self, spec: DataSpec, tokenizer: Tokenizer, shape: BatchShape, seed: int) -> None:
        self._spec, self._tokenizer, self._shape, self._seed = spec, tokenizer, shape, seed
        self._rows: dict[Stream, Iterator[npt.NDArray[np.int64]]] = {}
        self._next: dict[Stream, int] = {}

    def step(self, stream: Stream, step: int) -> Iterator[torch.Tensor]:
        """See `Batches`."""
        shape = self._shape
        if stream not in self._rows or step < self._next[stream]:
            self._rows[stream], self._next[stream] = self._packed(stream), 0
        skip = (step - self._next[stream]) * shape.micro * shape.accumulation
        for _ in islice(self._rows[stream], skip):
            pass
        self._next[stream] = step + 1
        for _ in range(shape.accumulation):
            yield torch.from_numpy(np.stack(list(islice(self._rows[stream], shape.micro))))

    def _packed(self, stream: Stream) -> Iterator[npt.NDArray[np.int64]]:
        """Yield sequences of `length` tokens without end. Each pass over the data set has a new order."""
        left = np.zeros(0, dtype=np.int64)
        epoch = 0
        while True:
            seed = int(np.random.default_rng((self._seed, STREAMS.index(stream), epoch)).integers(2**31))
            produced = False
            for text in self._documents(seed):
                ids = [*text, self._tokenizer.end]
                left = np.concatenate([left, np.asarray(ids, dtype=np.int64)])
                while len(left) >= self._shape.length:
                    produced = True
                    yield left[: self._shape.length]
                    left = left[self._shape.length :]
            if not produced and not len(left):
                raise MolsConfigError(f"data {self._spec.source}: the training split has no text")
            epoch += 1

    def _documents(self, seed: int) -> Iterator[list[int]]:
        """Yield token ids of this rank's training documents, tokenized in batches."""
        spec, shape = self._spec, self._shape
        documents = stream_documents(spec, spec.train_split, seed=seed, rank=shape.rank, world=shape.world)
        threshold = hash_threshold(spec.eval_share) if spec.eval_split is None else 0
        kept = (text for text in documents if document_hash(text, self._seed) >= threshold)
        while batch := list(islice(kept, STREAM_DOCUMENTS)):
            yield from self._tokenizer.encode(batch)


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
