"""Unit tests start no process and import no engine: refused here, while they are imported and while they run."""

from __future__ import annotations

import builtins
import multiprocessing.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NoReturn

import pytest

ENGINES = frozenset(
    [
        "deepspeed",
        "megatron",
        "transformer_engine",
        "transformers",
        "peft",
        "accelerate",
        "trl",
        "lightning",
        "pytorch_lightning",
    ]
)
STARTS: tuple[tuple[Any, str], ...] = (
    *((os, name) for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp", "system", "popen", "execve")),
    (subprocess.Popen, "__init__"),
    (multiprocessing.util, "spawnv_passfds"),
)
"""Where a process starts; all else in the standard library goes through one of these."""


class NotForUnitTests(AssertionError):
    """What a unit test did that belongs to tests/apps or tests/engines."""


class _Refusal:
    """A finder that finds no engine, for `importlib.import_module`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        refuse_engine(name)
        return None


def refuse_engine(name: str) -> None:
    """Raises NotForUnitTests for a module of an engine."""
    if name.partition(".")[0] in ENGINES:
        raise NotForUnitTests(f"a unit test imports {name}: put it into tests/engines or tests/apps")


def refuse_process(*_: Any, **__: Any) -> NoReturn:
    """Raises NotForUnitTests."""
    raise NotForUnitTests("a unit test starts a process: put it into tests/engines or tests/apps")


@contextmanager
def guard() -> Iterator[None]:
    """Inside, an import of an engine fails, also of one that is imported already, and so does a new process."""
    stock: Callable[..., Any] = builtins.__import__

    def checked(name: str, *arguments: Any, **more: Any) -> Any:
        level = more.get("level", arguments[3] if len(arguments) > 3 else 0)
        if level == 0:
            refuse_engine(name)
        return stock(name, *arguments, **more)

    finder = _Refusal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "__import__", checked)
        patch.setattr(sys, "meta_path", [finder, *sys.meta_path])
        for owner, name in STARTS:
            patch.setattr(owner, name, refuse_process)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Importing a test module, and what it imports for the first time."""
    if isinstance(collector, pytest.Module) and Path(__file__).parent in collector.path.parents:
        with guard():
            return (yield)
    return (yield)


@pytest.fixture(autouse=True)
def no_engine_and_no_process() -> Iterator[None]:
    with guard():
        yield
