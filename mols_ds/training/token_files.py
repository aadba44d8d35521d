"""Token files: Megatron-core's indexed data set, for both engines.

NAME.bin has the tokens of all documents, each followed by the end-of-text token, as a flat array that ranks memory-map;
NAME.idx has the length of each document.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 1 << 22
DIGEST_PARTS = 64
TRAIN, HELD_OUT = "train", "held_out"

TokenType = np.dtype[np.integer[Any]]
Tokens = npt.NDArray[np.integer[Any]]


def digest(tokens: Tokens) -> str:
    """Return the length and a CRC-32 of up to `DIGEST_PARTS` pieces, evenly spaced, so that it is quick."""
    piece = 1 << 16
    starts = np.linspace(0, max(0, len(tokens) - piece), DIGEST_PARTS, dtype=np.int64)
    value = 0
    for start in starts if len(tokens) > piece else starts[:1]:
        value = zlib.crc32(np.ascontiguousarray(tokens[start : start + piece]).tobytes(), value)
    return f"{len(tokens)} tokens, {value:08x}"


def token_dtype(vocab_size: int) -> TokenType:
    """Return the dtype that Megatron-core chooses for a vocabulary (`DType.optimal_dtype`)."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class IndexedWriter:
    """Write PREFIX.bin and PREFIX.idx as Megatron-core's `IndexedDatasetBuilder` does, which needs not be installed.

    Source: megatron/core/datasets/indexed_dataset.py (0.16).
    """

    def __init__(self, prefix: Path, dtype: TokenType) -> None:
        self._prefix, self._dtype = prefix, dtype
        self._lengths = array("i")
        self._file = prefix.with_suffix(".bin").open("wb")

    def add(self, documents: Sequence[Sequence[int]], end: int) -> int:
        """Write documents, each followed by `end`. Returns the number of tokens."""
        flat = np.concatenate([np.fromiter((*ids, end), self._dtype, len(ids) + 1) for ids in documents])
        self._file.write(flat.data)
        # `end` within a text ends a document too, as in Megatron's own preprocessing of such text
        self._lengths.extend(np.diff(np.flatnonzero(flat == end), prepend=-1).tolist())
        return len(flat)

    def close(self) -> None:
        """Write the index."""
        self._file.close()
        lengths = np.frombuffer(self._lengths, np.int32)
        code = {"<u2": 8, "<i4": 4}[self._dtype.str]
        with self._prefix.with_suffix(".idx").open("wb") as file:
            file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1))
            file.write(lengths.data)
            starts = np.cumsum(lengths, dtype=np.int64)
            starts -= lengths
            starts *= self._dtype.itemsize
            file.write(starts.data)
            file.write(np.arange(len(lengths) + 1, dtype=np.int64).data)


def write_tokens(
    folder: Path,
    encode: Callable[[list[str]], list[list[int]]],
    end: int,
    vocab_size: int,
    documents: Iterable[tuple[str, str]],
    *,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the token files of documents to `folder`. A fast tokenizer encodes a batch on all cores, while this thread
    reads the next.

    Args:
        documents: each (`TRAIN` or `HELD_OUT`, text).
        end: token to put behind each.
        limit: stop after the first batch of documents that reaches this number of tokens.
        progress: called with the number of characters of each batch.
    """
    writers = {name: IndexedWriter(folder / name, token_dtype(vocab_size)) for name in (TRAIN, HELD_OUT)}
    written = 0

    def write(batch: list[tuple[str, str]], encoded: list[list[int]]) -> int:
        by_name: dict[str, list[list[int]]] = {}
        for (name, _), ids in zip(batch, encoded, strict=True):
            by_name.setdefault(name, []).append(ids)
        if progress is not None:
            progress(sum(len(text) for _, text in batch))
        return sum(writers[name].add(ids, end) for name, ids in by_name.items())

    with ThreadPoolExecutor(1) as encoder:
        pending: tuple[list[tuple[str, str]], Future[list[list[int]]]] | None = None
        for batch in _batches(documents):
            following = batch, encoder.submit(encode, [text for _, text in batch])
            if pending is not None:
                written += write(pending[0], pending[1].result())
            pending = following
            if limit is not None and written >= limit:
                break
        if pending is not None:
            write(pending[0], pending[1].result())
    for writer in writers.values():
        writer.close()


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Yield lists of at most `BATCH_DOCUMENTS` documents and about `BATCH_CHARACTERS` characters."""
    batch: list[tuple[str, str]] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document[1])
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def map_tokens(path: Path, vocab_size: int) -> Tokens:
    """Memory-map the tokens of an `IndexedWriter`'s .bin file read-only, shape (tokens,)."""
    dtype = token_dtype(vocab_size)
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")
