"""JSON that users and other programs wrote, as plain values that the rest of the code can walk through."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from itertools import chain, islice

from mols_ds.core.files import read_text
from mols_ds.core.json_types import JsonObject
from mols_ds.errors import MolsConfigError, printable

DEEPEST = 100
"""Levels of objects and lists. Python's own limit, 1,000 calls, is met later, by whatever walks through them."""
MOST = 10_000_000
"""Values, each counted as often as it is met."""
BITS = 64
"""Of a whole number, with its sign."""


def read_json(path: str | os.PathLike[str], where: str) -> object:
    """The content of a JSON file. Raises MolsConfigError, in one line that begins with `where`."""
    return parse_json(read_text(path, where), where)


def parse_json(text: str, where: str) -> object:
    """JSON text as plain values.

    Raises:
        MolsConfigError: not JSON, a key stands there twice, or `check_plain`; one line that begins with `where`.
    """
    try:
        content: object = json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, where))
    except MolsConfigError:
        raise
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else printable(error)
        raise MolsConfigError(f"{where}: not JSON: {what}") from error
    check_plain(content, where)
    return content


def _once(pairs: list[tuple[str, object]], where: str) -> JsonObject:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise MolsConfigError(f"{where}: key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return content


def check_plain(content: object, where: str, most: int = MOST) -> None:
    """Check that functions that call themselves can walk through values, and that machines can count to the numbers.

    Args:
        content: dicts, lists and what they hold.
        where: begins the message.
        most: values.

    Raises:
        MolsConfigError: nested deeper than DEEPEST (or in itself), more than `most` values, or a whole number of more
            than BITS bits; one line.
    """
    level, count = [content], 1
    for _ in range(DEEPEST):
        for value in level:
            if isinstance(value, int) and value.bit_length() >= BITS:
                raise MolsConfigError(f"{where}: a whole number of {value.bit_length() + 1} bits; {BITS} are allowed")
        level = list(islice(chain.from_iterable(map(_inside, level)), most))
        count += len(level)
        if count > most:
            raise MolsConfigError(f"{where}: more than {most:,} values, where an alias counts as what it stands for")
        if not level:
            return
    raise MolsConfigError(f"{where}: nested too deeply, in more than {DEEPEST} levels")


def _inside(value: object) -> Collection[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()
