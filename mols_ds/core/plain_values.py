"""Plain values, as JSON and YAML have them: bounded, so that the rest of the code can walk through them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain, islice

from mols_ds.errors import MolsConfigError

DEEPEST = 100
"""Levels of objects and lists. Python's own limit, 1,000 calls, is met later, by whatever walks through them."""
MOST = 10_000_000
"""Values, each counted as often as it is met."""
BITS = 64
"""Of a whole number, with its sign."""


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
                place = f'{where[:-1]}.{_path(content, value)}"' if where.endswith('"') else where
                raise MolsConfigError(f"{place}: a whole number of {value.bit_length() + 1} bits; {BITS} are allowed")
        level = list(islice(chain.from_iterable(map(_inside, level)), most))
        count += len(level)
        if count > most:
            raise MolsConfigError(f"{where}: more than {most:,} values, where an alias counts as what it stands for")
        if not level:
            return
    raise MolsConfigError(f"{where}: nested too deeply, in more than {DEEPEST} levels")


def _path(content: object, wanted: object) -> str:
    """The keys under which a value stands, joined by points; "" where it stands in a list."""
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if value is wanted:
            return str(key)
        if inner := _path(value, wanted):
            return f"{key}.{inner}"
    return ""


def _inside(value: object) -> Collection[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()
