"""Replace attributes temporarily."""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableSequence
from types import ModuleType
from typing import TypeVar

_MISSING = object()
T = TypeVar("T")


class Patches:
    """Replace attributes of modules and classes until `undo()`, which restores them in reverse order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set(self, owner: ModuleType | type, name: str, value: object) -> None:
        """Replace or add `owner.name`."""
        # vars(), not getattr(): restore the class's own raw entry (a staticmethod), never an inherited one.
        before = vars(owner).get(name, _MISSING)
        setattr(owner, name, value)
        back = functools.partial(delattr, owner, name) if before is _MISSING else None
        self._undo.append(back or functools.partial(setattr, owner, name, before))

    def insert(self, sequence: MutableSequence[T], item: T) -> None:
        """Insert `item` at the front of `sequence`."""
        sequence.insert(0, item)
        self._undo.append(functools.partial(sequence.remove, item))

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()
