"""From text to packed tokens: the tokenizer (from a folder, or trained on the data) and token files on disk.

Token files are Megatron-core's indexed data set (`token_files`). Every source of a mixture has its own. Tokenizer and
token files are built once, by the first process that gets the lock. Their names in the cache folder change with
everything that they depend on.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock

from mols_ds.core.files import make_once
from mols_ds.core.json_text import read_json
from mols_ds.core.json_types import JsonObject
from mols_ds.core.log import warn_here
from mols_ds.errors import MolsConfigError
from mols_ds.training.progress import Tokenizing
from mols_ds.training.sources import (
    HUGE_CHARACTERS,
    DataSpec,
    document_hash,
    fingerprint,
    hash_threshold,
    local_documents,
    local_files,
    local_threshold,
    one_line,
    open_stream,
    stream_texts,
)
from mols_ds.training.token_files import HELD_OUT, TRAIN, Tokens, digest, map_tokens, write_tokens

END_OF_TEXT = "<|endoftext|>"
TRAINING_CHARACTERS = 16_000_000
"""Characters to train the tokenizer on, from the start of the training documents: more changes it little."""
SKIPPED = "skipped.json"
FORMAT = "indexed"
"""Part of the names of token folders: a flat array in release 0.4.0."""


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
    """Flat token arrays, memory-mapped read-only.

    Attributes:
        train: of each source; empty for a streamed source.
        held_out: of all sources together.
        prefixes: path of each source's training tokens without suffix.
        weights: of the sources.
    """

    train: tuple[Tokens, ...]
    held_out: Tokens
    prefixes: tuple[str, ...] = ()
    weights: tuple[float, ...] = (1.0,)

    @property
    def digests(self) -> JsonObject:
        """What the order of the data depends on, by name."""
        train = [digest(part) for part in self.train]
        return {"train": train, "held_out": digest(self.held_out), "weights": list(self.weights)}


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

    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:  # as transformers calls it, which also copies each token three times
        fast.no_truncation()
        fast.no_padding()
        fast.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))

    def encode(texts: list[str]) -> list[list[int]]:
        if fast is not None:
            return [encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)]
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
    """Return the tokenizer and token files of a source or mixture. Builds what the cache lacks.

    Every process of a job may call this at the same time.

    Args:
        seed: decides which documents are held out.
        held_out_tokens: number of held-out tokens of a streamed source to keep on disk; those of a mixture.
    """
    sources = [_SplitSource(part, seed) for part in spec.sources]
    shares = [part.weight / sum(part.weight for part in spec.sources) for part in spec.sources]
    trained = tokenizer is None
    if tokenizer is None:
        name = f"tokenizer-{vocab_size}-{fingerprint(spec, vocab_size, seed, TRAINING_CHARACTERS, shares)}"

        def documents() -> Iterator[str]:
            for source, share in zip(sources, shares, strict=True):
                yield from _limited(source.train(), round(TRAINING_CHARACTERS * share))

        tokenizer = cached(cache / name, lambda folder: train_tokenizer(documents(), vocab_size, folder))
    loaded = load_tokenizer(tokenizer)
    if trained:
        loaded = replace(loaded, name="trained on the data")
    folders = [_tokens_of(source, loaded, cache, held_out_tokens) for source in sources]
    held_out = [map_tokens(folder / "held_out.bin", loaded.size) for folder in folders]
    if len(folders) > 1:
        held_out = [
            np.concatenate([h[: math.ceil(s * held_out_tokens)] for h, s in zip(held_out, shares, strict=True)])
        ]
    if spec.streaming:
        return loaded, TokenData((), held_out[0], weights=tuple(shares))
    train = tuple(map_tokens(folder / "train.bin", loaded.size) for folder in folders)
    return loaded, TokenData(train, held_out[0], tuple(str(folder / "train") for folder in folders), tuple(shares))


def _tokens_of(source: "_SplitSource", tokenizer: Tokenizer, cache: Path, held_out_tokens: int) -> Path:
    """Return the folder with the token files of one source."""
    spec = source.spec
    parts = (tokenizer.identity, tokenizer.size, source.seed, held_out_tokens * spec.streaming, FORMAT)

    def build(folder: Path) -> None:
        skipped = Counter[str]()
        write = partial(write_tokens, folder, tokenizer.encode, tokenizer.end, tokenizer.size)
        if spec.streaming:
            write(((HELD_OUT, text) for text in source.held_out()), limit=held_out_tokens)
        else:
            total = sum(path.stat().st_size for path in local_files(spec))
            with Tokenizing(spec.source, total) as progress:
                write(source.sides(skipped), progress=progress)
        (folder / SKIPPED).write_text(json.dumps(skipped), "utf-8")

    folder = cached(cache / f"tokens-{fingerprint(spec, *parts)}", build)
    _warn_of_skipped(spec, folder)
    return folder


def _warn_of_skipped(spec: DataSpec, folder: Path) -> None:
    """Warn if the token files of `folder` lack rows of the source."""
    skipped = read_json(folder / SKIPPED, str(folder / SKIPPED))
    if isinstance(skipped, dict) and skipped:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
        limit = f"; huge: over {HUGE_CHARACTERS:,} characters" if "huge" in skipped else ""
        warn_here(f"data {spec.source}: rows were skipped ({counts}{limit})", stacklevel=2)


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

    def sides(self, skipped: Counter[str] | None = None) -> Iterator[tuple[str, str]]:
        """Yield (`TRAIN` or `HELD_OUT`, document) of a split in order."""
        spec = self.spec
        if spec.streaming:
            documents = stream_texts(spec, open_stream(spec, spec.train_split))
            if spec.eval_split is not None:
                yield from ((TRAIN, text) for text in documents)
                return
        else:
            documents = local_documents(spec, skipped)
        for text in documents:
            yield HELD_OUT if document_hash(text, self.seed) < self.threshold else TRAIN, text

    def train(self) -> Iterator[str]:
        return (text for side, text in self.sides() if side == TRAIN)

    def held_out(self) -> Iterator[str]:
        spec = self.spec
        if spec.eval_split is not None and spec.streaming:
            return stream_texts(spec, open_stream(spec, spec.eval_split))
        return (text for side, text in self.sides() if side == HELD_OUT)


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
