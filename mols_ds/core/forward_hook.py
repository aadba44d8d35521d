"""A forward hook that copies of the module do not keep."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch


class ForwardHook:
    """Call a bound method at each forward pass of a module, through a weak reference.

    `copy.deepcopy(module)` (an EMA, a reference model) would otherwise copy the engine and its process groups; the
    copy gets a hook that does nothing. The reference is weak because Megatron's DDP is never collected: its hooks hold
    it through C++. torch.compile leaves the call out of its graphs.
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
