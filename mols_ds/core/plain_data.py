"""Bounds of what users and other programs wrote, so that the rest of the code can walk through it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
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
        if any(map(_too_large, level)):
            raise MolsConfigError(f'{where}: "{next(_places(content))}": a whole number of more than {BITS} bits')
        level = list(islice(chain.from_iterable(map(_inside, level)), most))
        count += len(level)
        if count > most:
            raise MolsConfigError(f"{where}: more than {most:,} values, where an alias counts as what it stands for")
        if not level:
            return
    raise MolsConfigError(f"{where}: nested too deeply, in more than {DEEPEST} levels")


def _too_large(value: object) -> bool:
    return isinstance(value, int) and value.bit_length() >= BITS


def _inside(value: object) -> Collection[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _places(content: object) -> Iterator[str]:
    """The keys that lead to each number that is too large, such as "optimizer.params.lr", level by level."""
    level = [("", content)]
    while level:
        yield from (place for place, value in level if _too_large(value))
        level = [
            (f"{place}.{key}" if place else str(key), item)
            for place, value in level
            for key, item in (value.items() if isinstance(value, Mapping) else enumerate(_inside(value)))
        ]
