"""Replace methods of one object for a while. Wrappers that others add before or after stay."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

_MISSING = object()
Method = Callable[..., Any]


class ReplacedMethods:
    """Replace methods of the instance `owner` until `undo()`. Changes no class."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._active = True
        self._replaced: list[tuple[str, Method, object]] = []

    def set(self, name: str, method: Method) -> Method:
        """Replace `owner.name` by `method`. Returns the former method, for `method` to call."""
        stock: Method = getattr(self._owner, name)

        @functools.wraps(stock)
        def function(owner: Any, *args: Any, **kwargs: Any) -> Any:
            return (method if self._active else stock)(*args, **kwargs)

        call = types.MethodType(function, self._owner)  # torch's schedulers read `optimizer.step.__func__`
        self._replaced.append((name, call, vars(self._owner).get(name, _MISSING)))
        setattr(self._owner, name, call)
        return stock

    def undo(self) -> None:
        """Restore the former methods. A wrapper that was added around ours stays and calls the former method."""
        self._active = False
        for name, call, before in reversed(self._replaced):
            if vars(self._owner).get(name) is not call:
                continue
            if before is _MISSING:
                delattr(self._owner, name)
            else:
                setattr(self._owner, name, before)
        self._replaced = []
