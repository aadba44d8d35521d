"""From text to packed tokens: the tokenizer (from a folder, or trained on the data) and token files on disk.

A token file has the tokens of all documents, each followed by the end-of-text token, as a flat little-endian array that
ranks memory-map. Tokenizer and token files are built once, by the first process that gets the lock. Their names in the
cache folder change with everything that they depend on.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from mols_ds.core.files import make_once
from mols_ds.errors import MolsConfigError
from mols_ds.training.sources import (
    DataSpec,
    document_hash,
    fingerprint,
    hash_threshold,
    local_documents,
    local_threshold,
    one_line,
    stream_documents,
)

END_OF_TEXT = "<|endoftext|>"
TRAINING_CHARACTERS = 16_000_000
"""Characters to train the tokenizer on, from the start of the training documents: more changes it little."""
BATCH_DOCUMENTS = 512

TokenType = np.dtype[np.unsignedinteger[Any]]
Tokens = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Tokenizer:
    """Byte-level BPE with the two functions for packing. `identity` names it in cache folders."""

    encode: Callable[[list[str]], list[list[int]]]
    end: int
    size: int
    identity: str


@dataclass(frozen=True)
class TokenData:
    """Flat token arrays, memory-mapped read-only. `train` is None for a streamed source."""

    train: Tokens | None
    held_out: Tokens


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a transformers tokenizer folder, also of `train_tokenizer`. Raises MolsConfigError if it is missing, broken
    or has no end-of-text token."""
    if not folder.is_dir():
        raise MolsConfigError(f"tokenizer {folder}: no such folder")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more for a broken folder
        raise MolsConfigError(f"tokenizer {folder}: cannot be loaded: {one_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise MolsConfigError(f"tokenizer {folder}: it has no end-of-text token to put between documents")

    def encode(texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return Tokenizer(encode, int(tokenizer.eos_token_id), len(tokenizer), str(folder.resolve()))


def train_tokenizer(documents: Iterable[str], size: int, folder: Path) -> None:
    """Train byte-level BPE of `size` tokens and write it to `folder` as a transformers tokenizer folder.

    Deterministic for the same documents.

    Raises:
        MolsConfigError: `size` is too small for the 256 bytes and the end-of-text token.
    """
    if size < 257:
        raise MolsConfigError(f"vocabulary size {size}: byte-level BPE needs at least 257 tokens")
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        _limited(documents, TRAINING_CHARACTERS), vocab_size=size, special_tokens=[END_OF_TEXT], show_progress=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def _limited(documents: Iterable[str], characters: int) -> Iterator[str]:
    seen = 0
    for text in documents:
        if seen >= characters:
            return
        seen += len(text)
        yield text


def prepare(
    spec: DataSpec, cache: Path, *, tokenizer: Path | None, vocab_size: int, seed: int, held_out_tokens: int
) -> tuple[Tokenizer, TokenData]:
    """Return the tokenizer and token files of a source. Builds what the cache lacks.

    Every process of a job may call this at the same time.

    Args:
        seed: decides which documents are held out.
        held_out_tokens: number of held-out tokens of a streamed source to keep on disk.
    """
    source = _SplitSource(spec, seed)
    if tokenizer is None:
        name = f"tokenizer-{vocab_size}-{fingerprint(spec, vocab_size, seed, TRAINING_CHARACTERS)}"
        tokenizer = cached(cache / name, lambda folder: train_tokenizer(source.train(), vocab_size, folder))
    loaded = load_tokenizer(tokenizer)
    name = f"tokens-{fingerprint(spec, loaded.identity, loaded.size, seed, held_out_tokens * spec.streaming)}"

    def build(folder: Path) -> None:
        if spec.streaming:
            write_tokens(source.held_out(), loaded, folder / "held_out.bin", limit=held_out_tokens)
        else:
            write_tokens(source.train(), loaded, folder / "train.bin")
            write_tokens(source.held_out(), loaded, folder / "held_out.bin")

    folder = cached(cache / name, build)
    train = None if spec.streaming else map_tokens(folder / "train.bin", loaded.size)
    return loaded, TokenData(train, map_tokens(folder / "held_out.bin", loaded.size))


class _SplitSource:
    """Both sides of a source's split, as new iterators over documents."""

    def __init__(self, spec: DataSpec, seed: int) -> None:
        self.spec, self.seed = spec, seed
        self._threshold: int | None = None

    @property
    def threshold(self) -> int:
        if self._threshold is None:
            share, seed = self.spec.eval_share, self.seed
            streaming = self.spec.streaming
            self._threshold = (
                hash_threshold(share) if streaming else local_threshold(local_documents(self.spec), share, seed)
            )
        return self._threshold

    def _documents(self, split: str) -> Iterator[str]:
        spec = self.spec
        return stream_documents(spec, split, seed=None) if spec.streaming else local_documents(spec)

    def train(self) -> Iterator[str]:
        documents = self._documents(self.spec.train_split)
        if self.spec.eval_split is not None and self.spec.streaming:
            return documents
        return (text for text in documents if document_hash(text, self.seed) >= self.threshold)

    def held_out(self) -> Iterator[str]:
        if self.spec.eval_split is not None and self.spec.streaming:
            return self._documents(self.spec.eval_split)
        documents = self._documents(self.spec.train_split)
        return (text for text in documents if document_hash(text, self.seed) < self.threshold)


def cached(folder: Path, build: Callable[[Path], None], option: str = "--cache-dir") -> Path:
    """Return `folder`; if it is missing, let `build` fill it under a lock and rename it when complete, so that an
    interrupted build leaves nothing that looks finished. Raises MolsConfigError that names the `option` for the folder.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(folder) + ".lock")
        with lock:
            if not folder.is_dir():
                make_once(folder, build)
    except OSError as error:
        raise MolsConfigError(f"cache folder {folder.parent}: {one_line(error)} (set {option})") from error
    return folder


def token_dtype(vocab_size: int) -> TokenType:
    """Return uint16 if every token id fits, else uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def write_tokens(documents: Iterable[str], tokenizer: Tokenizer, path: Path, limit: int | None = None) -> int:
    """Write the documents' tokens, each document with an end token, and return their number. Stops after the first
    batch of documents that reaches `limit` tokens."""
    dtype = token_dtype(tokenizer.size)
    written = 0
    source = iter(documents)
    with path.open("wb") as file:
        while batch := list(islice(source, BATCH_DOCUMENTS)):
            flat = np.fromiter(_with_end(tokenizer, batch), dtype=dtype)
            file.write(flat.tobytes())
            written += len(flat)
            if limit is not None and written >= limit:
                break
    return written


def _with_end(tokenizer: Tokenizer, texts: list[str]) -> Iterator[int]:
    for ids in tokenizer.encode(texts):
        yield from ids
        yield tokenizer.end


def map_tokens(path: Path, vocab_size: int) -> Tokens:
    """Memory-map the tokens of a `write_tokens` file read-only, shape (tokens,)."""
    dtype = token_dtype(vocab_size)
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")
