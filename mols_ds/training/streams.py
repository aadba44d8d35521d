"""Batches of streamed data sets, which resume at the exact sample; the batches of a source or mixture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mols_ds.core.json_text import read_json
from mols_ds.core.json_types import JsonObject
from mols_ds.core.log import warn_here
from mols_ds.errors import MolsConfigError
from mols_ds.training.batches import STREAMS, Batches, BatchShape, MixedBatches, PackedBatches, RowBatches, Stream
from mols_ds.training.sources import DataSpec, document_hash, hash_threshold, open_stream, stream_texts
from mols_ds.training.tokens import TokenData, Tokenizer

STREAM_DOCUMENTS = 64
"""Documents per tokenizer call."""


@dataclass
class StreamPosition:
    """A place in a stream: the start of a shuffled block of documents.

    Attributes:
        first: number of sequences before it.
        epoch, block: passes over the data set before it; blocks of this pass before it.
        rows: state of `datasets.IterableDataset`; None: the start of the pass.
        left: tokens of the documents before it that fill no sequence.
        buffered: shuffled by `datasets`, as in release 0.4.0.
    """

    first: int = 0
    epoch: int = 0
    block: int = 0
    rows: JsonObject | None = None
    left: list[int] = field(default_factory=list)
    buffered: bool = False


class StreamedBatches(RowBatches):
    """Batches of a streamed data set: this rank's part, shuffled, tokenized and packed while reading.

    A hash selects held-out documents. `shuffle_buffer` rows at a time are permuted, so a checkpoint needs only the
    state of the data set at the start of such a block, from which `datasets` resumes exactly (it loses the content of
    its own shuffle buffer). A stream only moves forward: it reads and drops the sequences up to a later position, and
    starts again for an earlier one.
    """

    def __init__(self, spec: DataSpec, tokenizer: Tokenizer, shape: BatchShape, seed: int) -> None:
        super().__init__(shape)
        self.streams = (self,)
        self._spec, self._tokenizer, self._seed = spec, tokenizer, seed
        self._rows: dict[Stream, Iterator[npt.NDArray[np.int64]]] = {}
        self._next: dict[Stream, int] = {}
        self.place = StreamPosition()

    def position(self, step: int, pass_: int) -> int:
        """Position among the sequences of this rank."""
        return (step * self.shape.accumulation + pass_) * self.shape.micro

    def rows(self, stream: Stream, positions: npt.NDArray[np.int64]) -> torch.Tensor:
        """See `RowBatches`. The positions follow each other."""
        first = int(positions[0])
        if stream not in self._rows or first < self._next[stream]:
            self._rows[stream], self._next[stream] = (
                self._packed(stream, StreamPosition(buffered=self.place.buffered)),
                0,
            )
        for _ in islice(self._rows[stream], first - self._next[stream]):
            pass
        self._next[stream] = first + len(positions)
        return torch.from_numpy(np.stack(list(islice(self._rows[stream], len(positions)))))

    def check(self) -> None:
        """Read the first sequence ahead. Raises MolsConfigError if this rank's part has no text."""
        rows = self._packed("train", self.place)
        self._rows["train"], self._next["train"] = chain([next(rows)], rows), 0

    def resume(self, place: JsonObject | None) -> None:
        """Continue the training stream from a place.

        Args:
            place: the fields of a `StreamPosition`; None: a checkpoint of release 0.4.0. Its streams are read again
                from their start.
        """
        self.place = StreamPosition(buffered=True) if place is None else StreamPosition(**place)
        self._rows = {"train": self._packed("train", self.place)}
        self._next = {"train": self.place.first}

    def _packed(self, stream: Stream, place: StreamPosition) -> Iterator[npt.NDArray[np.int64]]:
        """Yield sequences of `length` tokens without end, from a place on. Each pass has a new order."""
        left = np.asarray(place.left, dtype=np.int64)
        first, epoch, block, state = place.first, place.epoch, place.block, place.rows
        while True:
            produced = block > 0
            for texts, following in self._blocks(stream, epoch, block, state, place.buffered):
                if stream == "train":
                    self.place = StreamPosition(first, epoch, block, state, left.tolist(), place.buffered)
                for ids in self._encoded(texts):
                    left = np.concatenate([left, np.asarray([*ids, self._tokenizer.end], dtype=np.int64)])
                    while len(left) >= self.shape.length:
                        yield left[: self.shape.length]
                        left, first = left[self.shape.length :], first + 1
                    produced = True
                block, state = block + 1, following
            if not produced:
                raise MolsConfigError(
                    f"data {self._spec.source}: the part of the training split for rank {self.shape.rank} of "
                    f"{self.shape.world} has no text: use fewer ranks or more data"
                )
            epoch, block, state = epoch + 1, 0, None

    def _blocks(
        self, stream: Stream, epoch: int, block: int, state: JsonObject | None, buffered: bool
    ) -> Iterator[tuple[Iterator[str], JsonObject | None]]:
        """Yield (documents, state of the data set behind them) of one pass from a block on. Documents in the order in
        which they are trained on."""
        spec, shape = self._spec, self.shape
        seed = int(np.random.default_rng((self._seed, STREAMS.index(stream), epoch)).integers(2**31))
        shuffled = seed if buffered else None
        rows = open_stream(spec, spec.train_split, rank=shape.rank, world=shape.world, shuffled=shuffled)
        if shuffled is not None:
            yield stream_texts(spec, rows), None
            return
        rows.set_epoch(seed)  # another order of the shards
        if state is not None:
            rows.load_state_dict(state)
        source = iter(rows)
        while chunk := list(islice(source, spec.shuffle_buffer)):
            texts = list(stream_texts(spec, chunk))
            order = np.random.default_rng((seed, block)).permutation(len(texts))
            yield (texts[i] for i in order), rows.state_dict()
            block += 1

    def _encoded(self, texts: Iterator[str]) -> Iterator[list[int]]:
        """Yield token ids of the training documents among `texts`, tokenized in batches."""
        threshold = hash_threshold(self._spec.eval_share) if self._spec.eval_split is None else 0
        kept = (text for text in texts if document_hash(text, self._seed) >= threshold)
        while batch := list(islice(kept, STREAM_DOCUMENTS)):
            yield from self._tokenizer.encode(batch)


def build_batches(spec: DataSpec, tokenizer: Tokenizer, tokens: TokenData, shape: BatchShape, seed: int) -> RowBatches:
    """Return the batches of a source or mixture.

    Raises:
        MolsConfigError: on every rank, if a source has too little text for one of them.
    """
    batches: list[RowBatches]
    if spec.streaming:
        streams = [StreamedBatches(part, tokenizer, shape, seed) for part in spec.sources]
        _agree(streams)
        batches = [*streams]
    else:
        batches = [PackedBatches(part, shape, seed) for part in tokens.train]
        count = sum(len(part) // shape.length for part in tokens.train)
        if count < shape.sequences:
            warn_here(
                f"data {spec.source}: {count} sequences of {shape.length} tokens, fewer than a global batch of "
                f"{shape.sequences}: each batch has some of them several times", stacklevel=2,
            )  # fmt: skip
    return batches[0] if len(batches) == 1 else MixedBatches(batches, tokens.weights, shape, seed)


def _agree(streams: Sequence[StreamedBatches]) -> None:
    """Check each rank's part of the streams, and raise the same MolsConfigError on all ranks."""
    problem: str | None = None
    try:
        for stream in streams:
            stream.check()
    except MolsConfigError as error:
        problem = str(error)
    problems = [problem] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise MolsConfigError(found)


def _path(folder: Path, rank: int, world: int) -> Path:
    return folder / f"stream_{rank}_of_{world}.json"


def save_places(batches: Batches, folder: Path) -> None:
    """Write the places of this rank's streams to a checkpoint."""
    if isinstance(batches, RowBatches) and batches.streams:
        places = [vars(stream.place) for stream in batches.streams if isinstance(stream, StreamedBatches)]
        _path(folder, batches.shape.rank, batches.shape.world).write_text(json.dumps(places), "utf-8")


def load_places(batches: Batches, folder: Path) -> None:
    """Continue this rank's streams from a checkpoint. Warns where they do not continue at the exact sample."""
    if not isinstance(batches, RowBatches) or not batches.streams:
        return
    path = _path(folder, batches.shape.rank, batches.shape.world)
    places: Any = read_json(path, str(path)) if path.is_file() else [None] * len(batches.streams)
    if not path.is_file() and any(folder.glob("stream_*_of_*.json")):
        warn_here(
            "--resume: streamed data is divided anew among another number of ranks: documents that were trained on may "
            "come again, others never", stacklevel=2,
        )  # fmt: skip
        return
    for stream, place in zip(batches.streams, places, strict=True):
        if isinstance(stream, StreamedBatches):
            stream.resume(place)
