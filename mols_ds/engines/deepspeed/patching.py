"""Replace `deepspeed.initialize`, for programs that call it themselves: Trainer, Accelerate, Lightning."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import deepspeed

from mols_ds.core.config import MolsConfig
from mols_ds.engines.deepspeed.api import Initialize, Initialized, initialize, initialize_over, is_left_out
from mols_ds.engines.deepspeed.engine import Loop
from mols_ds.errors import MolsError

_below: dict[Initialize, Initialize] = {}
"""Each replacement of `deepspeed.initialize` -> the function before it."""
_on = False
_section: ContextVar[Mapping[str, object] | MolsConfig | None] = ContextVar("mols_section", default=None)


def patch() -> None:
    """Replace `deepspeed.initialize`: with a "mols" section in its config it is `mols_ds.initialize`.

    Without a section the result is bit for bit the same as before. Replacements nest: ours calls an earlier one, and a
    later one may call ours. A second call does nothing.

    An engine with a section that another function builds raises a MolsError: a module has imported the stock function
    by name (`from deepspeed import initialize`), or an older function was put back.
    """
    global _on
    _on = True
    _watch_engines()
    if deepspeed.initialize not in _below and deepspeed.initialize is not initialize:
        _wrap(deepspeed.initialize)


def unpatch() -> None:
    """Undo `patch`, in any order with other replacements: a later one then calls the function below ours."""
    global _on
    _on = False
    while deepspeed.initialize in _below:
        deepspeed.initialize = _below.pop(deepspeed.initialize)
    init = deepspeed.DeepSpeedEngine.__init__
    if hasattr(init, "below_mols"):
        deepspeed.DeepSpeedEngine.__init__ = init.below_mols


def _watch_engines() -> None:
    """Refuse engines with a "mols" section that are built without our `deepspeed.initialize`."""
    stock = deepspeed.DeepSpeedEngine.__init__
    if hasattr(stock, "below_mols"):
        return

    @functools.wraps(stock)
    def init(engine: Any, *args: Any, **kwargs: Any) -> None:
        if _on and is_left_out(inspect.signature(stock).bind(engine, *args, **kwargs).arguments):
            raise MolsError(
                'the "mols" section would be left out: this engine is not built by the deepspeed.initialize of '
                "mols_ds.patch(), but by one that was imported by name earlier (from deepspeed import initialize) or "
                "put back later; call mols_ds.patch() before that import, or mols_ds.initialize"
            )
        stock(engine, *args, **kwargs)

    init.below_mols = stock  # type: ignore[attr-defined]
    deepspeed.DeepSpeedEngine.__init__ = init


@contextlib.contextmanager
def patched_with(section: Mapping[str, object] | MolsConfig) -> Iterator[None]:
    """Replace `deepspeed.initialize` within the context, with this section instead of the config's.

    For an integration that feeds extra batches for the samples of mode "probe".
    """
    token = _section.set(section)
    replaced = deepspeed.initialize
    ours = _wrap(replaced)
    try:
        yield
    finally:
        _section.reset(token)
        if deepspeed.initialize is ours:
            deepspeed.initialize = replaced
            del _below[ours]


def _wrap(below: Initialize) -> Initialize:
    @functools.wraps(below)
    def initialize_patched(*args: Any, **kwargs: Any) -> Initialized:
        section = _section.get()
        if not _on and section is None:
            return below(*args, **kwargs)
        loop: Loop = "client" if section is None else "extra"
        return initialize_over(below, args, kwargs, section=section, patched=True, loop=loop)

    _below[initialize_patched] = below
    deepspeed.initialize = initialize_patched
    return initialize_patched
