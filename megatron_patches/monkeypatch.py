"""Attributes that are replaced for a while, and put back."""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableSequence
from types import ModuleType
from typing import TypeVar

_MISSING = object()
T = TypeVar("T")


class Patches:
    """Attributes of modules and classes that are replaced until `undo()`; the last one set is put back first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set(self, owner: ModuleType | type, name: str, value: object) -> None:
        """Replace or add `owner.name`."""
        # vars(), not getattr(): a class must get its own raw entry back (a staticmethod) and nothing inherited.
        before = vars(owner).get(name, _MISSING)
        setattr(owner, name, value)
        back = functools.partial(delattr, owner, name) if before is _MISSING else None
        self._undo.append(back or functools.partial(setattr, owner, name, before))

    def insert(self, sequence: MutableSequence[T], item: T) -> None:
        """Put `item` in front of `sequence`."""
        sequence.insert(0, item)
        self._undo.append(functools.partial(sequence.remove, item))

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()
