"""Write files on machines that several users share: atomically, and never through another user's link.

A temporary name is random and created with O_EXCL, so nobody can plant a link there.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from mols_ds.errors import MolsConfigError


def write_whole(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write `content` (text, bytes, or a function that fills the file) to `path` atomically.

    A reader sees the old file or the new one, even after a power cut. Replaces a link at `path`. Leaves no temporary
    file after an error.

    Raises:
        OSError: or any exception of the function.
    """
    beside = name_beside(path)
    os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        if callable(content):
            content(beside)
        else:
            beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        synchronize(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def append(path: Path, text: str) -> None:
    """Append text to a file. Creates it if needed.

    Raises:
        OSError: also where `path` is a link or not a regular file (opening a pipe without a reader would block).
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is not a regular file")
        file.write(text)


def name_beside(path: Path) -> Path:
    """Return an unpredictable name in the folder of `path`: `.NAME.*.tmp`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def empty_folder(path: Path) -> None:
    """Make an empty folder at `path`, replacing what exists. Removes a link, does not follow it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.is_file():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()


def make_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Let `build` fill a new folder, then rename it to `folder`. Call it under a lock: it removes leftovers of a killed
    process. Raises OSError, or any exception of `build`."""
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    beside = name_beside(folder)
    beside.mkdir()
    build(beside)
    beside.replace(folder)


def synchronize(path: Path) -> None:
    """Flush a file or a folder to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_text(path: str | os.PathLike[str], where: str) -> str:
    """Read a regular UTF-8 text file.

    Args:
        path: the file.
        where: its name for the user, such as "config ds.json"; the message starts with it.

    Raises:
        MolsConfigError: missing, a folder, a pipe or a device, unreadable, or not UTF-8.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise MolsConfigError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise MolsConfigError(f"{where}: {getattr(error, 'strerror', None) or error}") from error
    what = "it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file (a pipe or a device)"
    raise MolsConfigError(f"{where}: {what}; a file is needed")
