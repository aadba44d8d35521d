"""Methods of one object that are replaced for a while; wrappers of others, put on before or after, stay."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MISSING = object()
Method = Callable[..., Any]


class ReplacedMethods:
    """Methods of the instance `owner` that are replaced until `undo()`. No class is touched."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._active = True
        self._replaced: list[tuple[str, Method, object]] = []

    def set(self, name: str, method: Method) -> Method:
        """Put `method` in the place of `owner.name`. Returns what was there, to be called by it."""
        stock: Method = getattr(self._owner, name)

        @functools.wraps(stock)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (method if self._active else stock)(*args, **kwargs)

        self._replaced.append((name, call, vars(self._owner).get(name, _MISSING)))
        setattr(self._owner, name, call)
        return stock

    def undo(self) -> None:
        """Put back what was there. A wrapper that was put on ours since stays, and calls what was there."""
        self._active = False
        for name, call, before in reversed(self._replaced):
            if vars(self._owner).get(name) is not call:
                continue
            if before is _MISSING:
                delattr(self._owner, name)
            else:
                setattr(self._owner, name, before)
        self._replaced = []
