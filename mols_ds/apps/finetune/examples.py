"""Read and check instructions and answers of files or data sets. Each example has its place in the source.

A row is {"prompt", "completion"}, Alpaca's {"instruction", "input", "output"} (input may be missing or empty), or
{"messages": [{"role", "content"}, ...]}. Other keys are ignored. Rows of one source may differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mols_ds.core.files import read_text
from mols_ds.core.json_text import parse_json
from mols_ds.core.json_types import JsonObject
from mols_ds.errors import MolsConfigError
from mols_ds.training.sources import READERS, DataSpec, local_files, one_line

Form = Literal["completion", "instruction", "messages"]
ROLES = ("system", "user", "assistant")
SUFFIXES = (".jsonl", ".json", ".parquet")
FORMS = '"prompt" and "completion", "instruction" and "output", or "messages"'


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation that ends with the assistant. `where`: its file and line, for messages. `form`: the form of the
    row, which decides its text."""

    messages: tuple[ChatMessage, ...]
    form: Form
    where: str
    input: str = ""
    """Second part of Alpaca's prompt."""


def read_examples(spec: DataSpec) -> list[Example]:
    """Read all examples of a source in order: JSONL, JSON (one list) or parquet files, or a split of a hub data set.

    Raises:
        MolsConfigError: a row that is not JSON, lacks a key or has an empty prompt or answer (names file and line); or
            a source that cannot be reached or has no examples.
    """
    if spec.mixture:
        raise MolsConfigError(f"data {spec.source}: a mixture is for train.py and train_megatron.py; name one source")
    rows = _hub_rows(spec) if spec.streaming else (row for path in local_files(spec) for row in _file_rows(path))
    examples = [parse_row(row, where) for where, row in rows]
    if not examples:
        raise MolsConfigError(f"data {spec.source}: it has no example")
    return examples


def _hub_rows(spec: DataSpec) -> Iterator[tuple[str, object]]:
    import datasets

    try:
        rows = datasets.load_dataset(spec.source, spec.subset, split=spec.train_split)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise MolsConfigError(
            f"data {spec.source}: neither a local file or folder nor a data set that the hub has: {one_line(error)}"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"data {spec.source} row {number}", row


def _file_rows(path: Path) -> Iterator[tuple[str, object]]:
    if path.suffix not in SUFFIXES:
        raise MolsConfigError(f"data {path}: examples are read from {', '.join(SUFFIXES)}, not from {path.suffix!r}")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    text = read_text(path, f"data {path}")
    if path.suffix == ".json":
        rows = parse_json(text, f"data {path}")
        if not isinstance(rows, list):
            raise MolsConfigError(f"data {path}: a JSON list of objects is needed (JSONL files end in .jsonl)")
        yield from ((f"data {path} entry {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"data {path} line {number}"
            yield where, parse_json(line, where)


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    import datasets

    try:
        rows = datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train", streaming=True)
        yield from ((f"data {path} row {number}", row) for number, row in enumerate(rows, 1))
    except Exception as error:  # datasets wraps the readers' errors in several types
        raise MolsConfigError(f"data {path}: cannot be read as parquet: {one_line(error)}") from error


def parse_row(row: object, where: str) -> Example:
    """Parse a row of any of the three forms. Raises MolsConfigError that starts with `where`."""
    if not isinstance(row, dict):
        raise MolsConfigError(f"{where}: a JSON object is needed, not {type(row).__name__}")
    if row.get("messages") is not None:
        return Example(_messages(row["messages"], where), "messages", where)
    if row.get("instruction") is not None:
        prompt, answer = _text(row, "instruction", where), _text(row, "output", where)
        more = row.get("input")
        if more is not None and not isinstance(more, str):
            raise MolsConfigError(f'{where}: "input" must be text, not {type(more).__name__}')
        return Example(_pair(prompt, answer), "instruction", where, more or "")
    if row.get("prompt") is not None or row.get("completion") is not None:
        return Example(_pair(_text(row, "prompt", where), _text(row, "completion", where)), "completion", where)
    raise MolsConfigError(f"{where}: it needs {FORMS}; its keys are {', '.join(map(str, row)) or 'none'}")


def _pair(prompt: str, answer: str) -> tuple[ChatMessage, ...]:
    return ChatMessage("user", prompt), ChatMessage("assistant", answer)


def _text(row: JsonObject, key: str, where: str) -> str:
    value = row.get(key)
    if value is None:
        raise MolsConfigError(f'{where}: key "{key}" is missing; its keys are {", ".join(map(str, row))}')
    if not isinstance(value, str):
        raise MolsConfigError(f'{where}: "{key}" must be text, not {type(value).__name__}')
    if not value.strip():
        raise MolsConfigError(f'{where}: "{key}" is empty')
    return value


def _messages(rows: object, where: str) -> tuple[ChatMessage, ...]:
    if not isinstance(rows, list | tuple) or not rows:
        raise MolsConfigError(f'{where}: "messages" must be a list of at least a question and an answer')
    messages = []
    for number, row in enumerate(rows, 1):
        place = f"{where}, message {number}"
        if not isinstance(row, dict):
            raise MolsConfigError(f'{place}: an object with "role" and "content" is needed, not {type(row).__name__}')
        role = row.get("role")
        if role not in ROLES:
            raise MolsConfigError(f'{place}: "role" is {role!r}; allowed: {", ".join(ROLES)}')
        messages.append(ChatMessage(role, _text(row, "content", place)))
    if messages[-1].role != "assistant":
        raise MolsConfigError(f"{where}: the last message is the {messages[-1].role}'s: there is no answer to train on")
    return tuple(messages)
