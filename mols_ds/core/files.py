"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Put `content` (text, bytes, or a function that fills the file it is given) at `path` in one move.

    A reader sees the old file or the new one, also after a power cut. Nothing is left behind where writing fails.
    Raises OSError, and whatever the function raises.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if callable(content):
            content(beside)
        else:
            beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        synchronize(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def synchronize(path: Path) -> None:
    """Have the system bring a file's, or a folder's, content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
