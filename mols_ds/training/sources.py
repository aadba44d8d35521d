"""Text for pre-training: sources, documents, and the split into training and held-out documents.

A source is the Python standard library's source code (the default, on every machine), a local file or folder of text,
JSONL or parquet, or the name of a data set on the Hugging Face hub, which is streamed. `tokens` and `batches` do
tokenizing, packing, shuffling and batching.
"""

import hashlib
import logging
import math
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from mols_ds.core.json_text import read_json
from mols_ds.core.json_types import JsonObject
from mols_ds.core.log import warn_here
from mols_ds.errors import MolsConfigError

STDLIB = "stdlib"
READERS = {".txt": "text", ".md": "text", ".py": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""Suffix of a local file -> reader of HF `datasets`."""
HUB_KEYS = ("subset", "train_split", "eval_split", "shuffle_buffer")
HUB_SECONDS = 20.0
PIECE_CHARACTERS = 16384
"""Longer text files are split at blank lines, so that one big file has documents to hold out."""
ROWS = 100
"""Rows of a JSONL or parquet file to read at once."""
BLOCK_CHARACTERS = 1 << 20
"""Characters of a text file to read at once."""
HUGE_CHARACTERS = 1 << 24
"""Longer documents are skipped: they are no text for a model, and one is held in memory whole."""


@dataclass(frozen=True, slots=True)
class DataSpec:
    """A data source. `source` is "stdlib", a path or a hub name. Other fields are for hub names, except `text_key`
    (text column, also of JSONL and parquet), `eval_share` (share of held-out documents if there is no `eval_split`),
    and those of a mixture: its sources are `mixture`, the share of each is its `weight` of the sum."""

    source: str = STDLIB
    subset: str | None = None
    text_key: str = "text"
    train_split: str = "train"
    eval_split: str | None = None
    eval_share: float = 0.02
    shuffle_buffer: int = 10_000
    weight: float = 1.0
    mixture: tuple["DataSpec", ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            kinds: Any = float | int if kind is float else kind
            if field.name != "mixture" and (isinstance(value, bool) or not isinstance(value, kinds)):
                what = kind.__name__ if isinstance(kind, type) else kind
                raise MolsConfigError(f"data {self.source}: {field.name} is {value!r}, which is not {what}")
        if not self.source.strip():  # Path("") is the current folder
            raise MolsConfigError("data: the source is empty; name a file, a folder or a data set")
        if not 0.0 < self.weight < math.inf:
            raise MolsConfigError(f"weight of {self.source} is {self.weight!r}: give a number above 0")
        if not 0.0 < self.eval_share < 1.0:
            raise MolsConfigError(f"eval_share is {self.eval_share!r}: give a share between 0 and 1, such as 0.02")
        if self.shuffle_buffer < 1:
            raise MolsConfigError(f"shuffle_buffer is {self.shuffle_buffer!r}: give a number of documents, at least 1")

    @property
    def streaming(self) -> bool:
        """Whether the source is a hub data set, which is streamed instead of tokenized whole."""
        if self.mixture:
            return self.mixture[0].streaming
        return self.source != STDLIB and not Path(self.source).exists()

    @property
    def sources(self) -> tuple["DataSpec", ...]:
        """The sources of a mixture; else this one."""
        return self.mixture or (self,)

    @classmethod
    def parse(cls, value: str, **overrides: Any) -> "DataSpec":
        """Parse the value of `--data`: "stdlib", a data file or folder, a JSON file with the key "source" or "mixture"
        (configs/data/), or a hub name. Raises MolsConfigError for a missing path or an unknown key."""
        path = Path(value)
        settings: JsonObject = {"source": value}
        if path.suffix == ".json" and path.is_file():
            settings = _settings_file(path) or settings
        if "mixture" in settings:
            return cls._mixture(value, settings, overrides)
        return cls._one(value, settings, overrides)

    @classmethod
    def _mixture(cls, value: str, settings: JsonObject, overrides: JsonObject) -> "DataSpec":
        given = settings.pop("mixture")
        rows = given if isinstance(given, list) else []
        if len(rows) < 2 or not all(isinstance(row, dict) and "source" in row for row in rows):
            raise MolsConfigError(f'{value}: "mixture" needs a list of two or more objects with "source" and "weight"')
        if settings:
            raise MolsConfigError(f'{value}: key {next(iter(settings))!r} belongs into the sources of "mixture"')
        mixture = tuple(cls._one(value, part, overrides) for part in rows)
        if len({part.streaming for part in mixture}) > 1:
            raise MolsConfigError(f"{value}: a mixture has local sources or data sets of the hub, not both")
        return cls(value, mixture=mixture)

    @classmethod
    def _one(cls, value: str, settings: JsonObject, overrides: JsonObject) -> "DataSpec":
        settings = settings | {key: given for key, given in overrides.items() if given is not None}
        known = [field.name for field in fields(cls) if field.name != "mixture"]
        for key in settings:
            if key not in known:
                raise MolsConfigError(f"{value}: unknown key {key!r}; known keys: {', '.join(known)}")
        spec = cls(**settings)
        looks_local = Path(spec.source).suffix in READERS or spec.source.startswith((".", "/", "~"))
        if spec.streaming and (looks_local or spec.source.count("/") > 1):
            raise MolsConfigError(f"data {spec.source}: no such file or folder")
        unused = [] if spec.streaming else [key for key in HUB_KEYS if settings.get(key) is not None]
        if unused:
            raise MolsConfigError(
                f"data {spec.source}: {', '.join(unused)} would do nothing for a local source: leave out"
            )
        return spec


def _settings_file(path: Path) -> JsonObject | None:
    """Return the object of a data settings file, or None if the file has data instead."""
    try:
        content = read_json(path, str(path))
    except MolsConfigError:
        return None
    return content if isinstance(content, dict) and {"source", "mixture"} & set(content) else None


def local_files(spec: DataSpec) -> list[Path]:
    """Return the files of a local source, sorted by path. Raises MolsConfigError if there are none."""
    if spec.source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [p for p in root.rglob("*.py") if "site-packages" not in p.parts and "dist-packages" not in p.parts]
    else:
        root = Path(spec.source)
        files = [root] if root.is_file() else [p for p in root.rglob("*") if p.is_file() and p.suffix in READERS]
        if root.is_file() and root.suffix not in READERS:
            raise MolsConfigError(f"data {root}: suffix {root.suffix!r} is not one of {', '.join(READERS)}")
    if not files:
        raise MolsConfigError(f"data {root}: no file with a suffix among {', '.join(READERS)} below this folder")
    return sorted(files)


def fingerprint(spec: DataSpec, *extra: object) -> str:
    """Return 16 hex digits that change with the source's settings, its files (path, size, time) or `extra`."""
    state: list[object] = [[str(part) for part in extra]]
    for source in spec.sources:
        state.append(sorted(asdict(replace(source, weight=1.0)).items()))
        if not source.streaming:
            state.append([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in local_files(source)])
    return hashlib.blake2b(repr(state).encode(), digest_size=8).hexdigest()


def cut(text: str, limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Split text at blank lines into pieces of at least `limit` characters (the last may be shorter). The pieces joined
    are the text."""
    start = 0
    while len(text) - start > limit:
        found = text.find("\n\n", start + limit)
        if found < 0:
            break
        yield text[start : found + 2]
        start = found + 2
    if start < len(text):
        yield text[start:]


def local_documents(spec: DataSpec, skipped: Counter[str] | None = None) -> Iterator[str]:
    """Yield the documents of a local source in a fixed order. A Python file of the standard library is one document, as
    is a row of JSONL or parquet; `cut` splits other text files.

    Args:
        skipped: counts the documents without text, and those longer than `HUGE_CHARACTERS`, by kind.

    Raises:
        MolsConfigError: a file cannot be read, or no document has text.
    """
    found = False
    readers = _stdlib(spec) if spec.source == STDLIB else chain.from_iterable(_rows(spec, p) for p in local_files(spec))
    for text in readers:
        fault = skip_reason(text)
        if fault is None and text is not None:
            found = True
            yield text
        elif skipped is not None:
            skipped[str(fault)] += 1
    if not found:
        raise MolsConfigError(f"data {spec.source}: it has no text")


def skip_reason(text: str | None) -> str | None:
    """Return the kind of a document that is no text to train on; None for all others."""
    if text is None:
        return "null"
    if len(text) > HUGE_CHARACTERS:
        return "huge"
    return None if text.strip() else "empty"


def _stdlib(spec: DataSpec) -> Iterator[str]:
    for path in local_files(spec):
        try:
            yield path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # some test files of the library are badly encoded on purpose


def _rows(spec: DataSpec, path: Path) -> Iterator[str | None]:
    """Yield the texts of one local file, read by HF `datasets`. None: a row whose text is null."""
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs it also raises; the message below has one line
    if path.stat().st_size == 0:
        return
    reader = READERS[path.suffix]
    try:
        if reader == "text":
            yield from _pieces(path)
            return
        key, rows = spec.text_key, datasets.load_dataset(reader, data_files=str(path), split="train", streaming=True)
        for batch in rows.iter(ROWS):  # row by row costs ten times the time
            for text in batch[key] if key in batch else [_text(batch, key, str(path))]:
                yield text if text is None else _text({**batch, key: text}, key, str(path))
    except MolsConfigError:
        raise
    except Exception as error:  # datasets wraps the readers' errors in several types
        raise MolsConfigError(f"data {path}: cannot be read as {reader}: {one_line(error)}") from error


def _pieces(path: Path) -> Iterator[str]:
    """Yield the pieces that `cut` makes of a text file, without holding the file in memory."""
    left = ""
    with path.open(encoding="utf-8") as file:
        while block := file.read(BLOCK_CHARACTERS):
            *pieces, left = cut(left + block)
            yield from pieces
            if len(left) > HUGE_CHARACTERS:  # is skipped: keep its length, and what may begin a blank line
                left = "x" * HUGE_CHARACTERS + left[-1]
    if left:
        yield left


def _text(row: JsonObject, key: str, where: str) -> str | None:
    text = row.get(key)
    if isinstance(text, str) or (text is None and key in row):
        return text
    if key in row:
        raise MolsConfigError(f"data {where}: column {key!r} has {type(text).__name__}, not text (set --text-key)")
    columns = ", ".join(map(str, row))
    raise MolsConfigError(f"data {where}: no text in column {key!r}; its columns are {columns} (set --text-key)")


def one_line(error: BaseException) -> str:
    """Return type and first line of an error's message that says what is wrong, or its type alone.

    Skips headings: lines that end with a colon, as those of transformers' validators and of torch's `load_state_dict`.
    Follows `datasets`' wrapper to its cause.
    """
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        return one_line(error.__cause__)
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    line = next((line for line in lines if not line.endswith(":")), lines[0] if lines else "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def document_hash(text: str, seed: int) -> int:
    """Return a 64-bit hash of a document under `seed`. Equal documents are on the same side of the split."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def hash_threshold(share: float) -> int:
    """Return the threshold below which a document's hash holds it out: `share` of them on average."""
    return int(share * 2**64)


def local_threshold(documents: Iterable[str], share: float, seed: int) -> int:
    """Return `hash_threshold`, moved if a small source would otherwise have no held-out or no training document.

    Raises:
        MolsConfigError: all documents are equal, so there is no split.
    """
    usual = hash_threshold(share)
    hashes: set[int] = set()
    for text in documents:
        hashes.add(document_hash(text, seed))
        if min(hashes) < usual <= max(hashes):
            return usual
    if len(hashes) < 2:
        raise MolsConfigError("the data has only one document: at least two are needed, one of them held out")
    return min(hashes) + 1 if min(hashes) >= usual else max(hashes)


def check_hub(spec: DataSpec) -> None:
    """Ask the hub once for a streamed source, so that a wrong name fails at once. Raises MolsConfigError."""
    from huggingface_hub import HfApi

    for source in spec.sources:
        if not source.streaming:
            continue
        try:
            HfApi().dataset_info(source.source, timeout=HUB_SECONDS)
        except Exception as error:  # the hub's client raises a dozen unrelated types
            raise _no_source(source, error) from error


def _no_source(spec: DataSpec, error: Exception) -> MolsConfigError:
    return MolsConfigError(
        f"data {spec.source}: neither a local file or folder nor a data set that the hub has: {one_line(error)}"
    )


def open_stream(spec: DataSpec, split: str, *, rank: int = 0, world: int = 1, shuffled: int | None = None) -> Any:
    """Open this rank's part of one split of a hub data set, as `datasets.IterableDataset`.

    Args:
        shuffled: seed for `datasets`' own shuffle buffer, whose content is not in the data set's state.

    Raises:
        MolsConfigError: the hub or the data set cannot be reached, or it has no text column.
    """
    from datasets import load_dataset
    from datasets.distributed import split_dataset_by_node

    try:
        rows = load_dataset(spec.source, spec.subset, split=split, streaming=True)
        first = next(iter(rows.take(1)), None)
        if shuffled is not None:
            rows = rows.shuffle(seed=shuffled, buffer_size=spec.shuffle_buffer)
        if world > 1:
            rows = split_dataset_by_node(rows, rank=rank, world_size=world)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise _no_source(spec, error) from error
    if first is not None:
        _text(first, spec.text_key, spec.source)
    return rows


def stream_texts(spec: DataSpec, rows: Iterable[JsonObject]) -> Iterator[str]:
    """Yield the documents of rows of a hub data set. Warns at the first row of each kind that is skipped."""
    for row in rows:
        text = _text(row, spec.text_key, spec.source)
        fault = skip_reason(text)
        if fault is None and text is not None:
            yield text
        else:
            _warn_of_row(spec.source, fault)


@cache
def _warn_of_row(source: str, fault: str | None) -> None:
    warn_here(f"data {source}: {fault} rows are skipped", stacklevel=3)
