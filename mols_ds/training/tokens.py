"""From text to packed tokens: the tokenizer (from a folder, or trained on the data) and token files on disk.

A token file has the tokens of all documents, each followed by the end-of-text token, as a flat little-endian array that
ranks memory-map. Tokenizer and token files are built once, by the first process that gets the lock. Their names in the
cache folder change with everything that they depend on.
"""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from mols_ds.core.files import make_once
from mols_ds.core.json_text import read_json
from mols_ds.core.log import warn_here
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
DIGEST_PARTS = 64
SKIPPED = "skipped.json"

TokenType = np.dtype[np.unsignedinteger[Any]]
Tokens = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Tokenizer:
    """Byte-level BPE with the two functions for packing.

    Attributes:
        identity: names it in cache folders.
        digest: of its tokens and their ids.
        name: for the user.
    """

    encode: Callable[[list[str]], list[list[int]]]
    end: int
    size: int
    identity: str
    digest: str = ""
    name: str = ""


@dataclass(frozen=True)
class TokenData:
    """Flat token arrays, memory-mapped read-only. `train` is None for a streamed source."""

    train: Tokens | None
    held_out: Tokens

    @property
    def digests(self) -> dict[str, str | None]:
        """Digest of each array, by name; None for a streamed source."""
        return {name: None if part is None else _digest(part) for name, part in vars(self).items()}


def _digest(tokens: Tokens) -> str:
    """Return the length and a CRC-32 of up to `DIGEST_PARTS` pieces, evenly spaced, so that it is quick."""
    piece = 1 << 16
    starts = np.linspace(0, max(0, len(tokens) - piece), DIGEST_PARTS, dtype=np.int64)
    value = 0
    for start in starts if len(tokens) > piece else starts[:1]:
        value = zlib.crc32(np.ascontiguousarray(tokens[start : start + piece]).tobytes(), value)
    return f"{len(tokens)} tokens, {value:08x}"


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

    vocabulary = sorted(tokenizer.get_vocab().items())
    digest = hashlib.blake2b(repr(vocabulary).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    end, size = int(tokenizer.eos_token_id), len(tokenizer)
    return Tokenizer(encode, end, size, str(folder.resolve()), digest, str(folder))


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
    try:
        bpe.save(str(folder / "tokenizer.json"))
    except Exception as error:  # the Rust library raises Exception for a full disk
        raise OSError(str(error)) from error
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
    trained = tokenizer is None
    if tokenizer is None:
        name = f"tokenizer-{vocab_size}-{fingerprint(spec, vocab_size, seed, TRAINING_CHARACTERS)}"
        tokenizer = cached(cache / name, lambda folder: train_tokenizer(source.train(), vocab_size, folder))
    loaded = load_tokenizer(tokenizer)
    if trained:
        loaded = replace(loaded, name="trained on the data")
    name = f"tokens-{fingerprint(spec, loaded.identity, loaded.size, seed, held_out_tokens * spec.streaming)}"

    def build(folder: Path) -> None:
        if spec.streaming:
            write_tokens(source.held_out(), loaded, folder / "held_out.bin", limit=held_out_tokens)
        else:
            skipped = Counter[str]()
            write_tokens(source.train(skipped), loaded, folder / "train.bin")
            write_tokens(source.held_out(), loaded, folder / "held_out.bin")
            (folder / SKIPPED).write_text(json.dumps(skipped), "utf-8")

    folder = cached(cache / name, build)
    _warn_of_skipped(spec, folder)
    train = None if spec.streaming else map_tokens(folder / "train.bin", loaded.size)
    return loaded, TokenData(train, map_tokens(folder / "held_out.bin", loaded.size))


def _warn_of_skipped(spec: DataSpec, folder: Path) -> None:
    """Warn if the token files of `folder` lack rows of the source, which had no text."""
    path = folder / SKIPPED
    skipped = read_json(path, str(path)) if path.is_file() else None
    if isinstance(skipped, dict) and skipped:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
        warn_here(f"data {spec.source}: rows without text were skipped ({counts})", stacklevel=2)


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

    def _documents(self, split: str, skipped: Counter[str] | None = None) -> Iterator[str]:
        spec = self.spec
        return stream_documents(spec, split, seed=None) if spec.streaming else local_documents(spec, skipped)

    def train(self, skipped: Counter[str] | None = None) -> Iterator[str]:
        documents = self._documents(self.spec.train_split, skipped)
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
