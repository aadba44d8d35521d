"""Limits for values of users and other programs, so that code can recurse through them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import chain, islice

from mols_ds.errors import MolsConfigError

MAX_DEPTH = 100
"""Nesting levels. Python's own limit is 1,000 calls."""
MAX_VALUES = 10_000_000
"""Number of values; aliases count each time."""
MAX_BITS = 64
"""Bits of an integer, with its sign."""


def check_plain(content: object, where: str, most: int = MAX_VALUES) -> None:
    """Check depth, number and integer size of plain values.

    Args:
        content: dicts, lists and their values.
        where: the message starts with it.
        most: largest number of values.

    Raises:
        MolsConfigError: nested deeper than MAX_DEPTH (or cyclic), more than `most` values, or an integer of more than
            MAX_BITS bits; one line.
    """
    level, count = [content], 1
    for _ in range(MAX_DEPTH):
        if any(map(_too_large, level)):
            raise MolsConfigError(f'{where}: "{next(_places(content))}": an integer of more than {MAX_BITS} bits')
        level = list(islice(chain.from_iterable(map(_inside, level)), most))
        count += len(level)
        if count > most:
            raise MolsConfigError(f"{where}: more than {most:,} values (an alias counts as all its values)")
        if not level:
            return
    raise MolsConfigError(f"{where}: nested too deeply, in more than {MAX_DEPTH} levels")


def _too_large(value: object) -> bool:
    return isinstance(value, int) and value.bit_length() >= MAX_BITS


def _inside(value: object) -> Collection[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _places(content: object) -> Iterator[str]:
    """Yield the path of each integer that is too large, such as "optimizer.params.lr"."""
    level = [("", content)]
    while level:
        yield from (place for place, value in level if _too_large(value))
        level = [
            (f"{place}.{key}" if place else str(key), item)
            for place, value in level
            for key, item in (value.items() if isinstance(value, Mapping) else enumerate(_inside(value)))
        ]
