"""A forward hook that does not travel with copies of the module."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch


class ForwardHook:
    """Calls a bound method at each pass of the module; keeps its object neither alive nor, in a copy, reachable.

    `copy.deepcopy(module)` (an EMA, a reference model) would follow a bound method into the engine and its process
    groups. What it gets is a hook that does nothing. The method's object is not held, since Megatron's DDP is never
    collected (its hooks hold it through C++). torch.compile leaves the call out of its graphs.
    """

    def __init__(self, method: Callable[..., None] | None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> None:
        method = None if self._method is None else self._method()
        if method is not None:
            method(*args)

    def __reduce__(self) -> tuple[type[ForwardHook], tuple[None]]:
        return ForwardHook, (None,)
