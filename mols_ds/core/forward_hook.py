"""A forward pre-hook that does not travel with copies of the module."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

Method = Callable[[nn.Module, Any], None]


class ForwardHook:
    """Calls a bound method before each forward pass; keeps its object neither alive nor, in a copy, reachable.

    `copy.deepcopy(module)` (an EMA, a reference model) would follow a bound method into the engine and its process
    groups. What it gets is a hook that does nothing. The method's object is not held, since
    Megatron's DDP is never collected (its hooks hold it through C++).
    """

    def __init__(self, method: Method | None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, module: nn.Module, args: Any) -> None:
        method = None if self._method is None else self._method()
        if method is not None:
            method(module, args)

    def __reduce__(self) -> tuple[type[ForwardHook], tuple[None]]:
        return ForwardHook, (None,)
