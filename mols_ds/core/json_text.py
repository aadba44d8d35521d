"""Read JSON of users and other programs as bounded plain values."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from mols_ds.core.files import read_text
from mols_ds.core.json_types import JsonObject
from mols_ds.core.plain_data import check_plain
from mols_ds.errors import MolsConfigError, printable


def read_json(path: str | os.PathLike[str], where: str) -> object:
    """Read a JSON file. Raises MolsConfigError: one line that starts with `where`."""
    return parse_json(read_text(path, where), where)


def parse_json(text: str, where: str, loads: Callable[..., object] = json.loads, *, once: bool = True) -> object:
    """Parse JSON text.

    Args:
        text: JSON, or what `loads` reads.
        where: begins the message.
        loads: `json.loads`, or that of a module with the same arguments.
        once: refuse a duplicate key; otherwise the last one counts.

    Raises:
        MolsConfigError: not JSON, a duplicate key, or a limit of `check_plain`; one line that starts with `where`.
    """
    try:
        content = loads(text, object_pairs_hook=(lambda pairs: _once(pairs, where)) if once else dict)
    except MolsConfigError:
        raise
    except (ValueError, IndexError, OverflowError, RecursionError) as error:  # hjson: IndexError for a cut-off text
        what = "nested too deeply" if isinstance(error, RecursionError) else printable(error)
        raise MolsConfigError(f"{where}: not JSON: {what}") from error
    check_plain(content, where)
    return content


def _once(pairs: list[tuple[str, object]], where: str) -> JsonObject:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise MolsConfigError(f"{where}: key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return content
