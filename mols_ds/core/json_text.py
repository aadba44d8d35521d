"""JSON that users and other programs wrote, as plain values that the rest of the code can walk through."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from mols_ds.core.files import read_text
from mols_ds.core.json_types import JsonObject
from mols_ds.core.plain_data import check_plain
from mols_ds.errors import MolsConfigError, printable


def read_json(path: str | os.PathLike[str], where: str) -> object:
    """The content of a JSON file. Raises MolsConfigError, in one line that begins with `where`."""
    return parse_json(read_text(path, where), where)


def parse_json(text: str, where: str, loads: Callable[..., object] = json.loads, *, once: bool = True) -> object:
    """JSON text as plain values.

    Args:
        text: JSON, or what `loads` reads.
        where: begins the message.
        loads: `json.loads`, or that of a module with the same arguments.
        once: refuse a key that stands there twice; otherwise the last one counts.

    Raises:
        MolsConfigError: not JSON, a key stands there twice, or `check_plain`; one line that begins with `where`.
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
        raise MolsConfigError(f"{where}: key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return content
