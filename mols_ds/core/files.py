"""Files on machines that several users share: written whole or not at all, and never through a link of somebody else.

A name that is made beside a file is random and made new (O_EXCL): nobody can have put a link there.
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
    """Put `content` (text, bytes, or a function that fills the file it is given) at `path` in one move.

    A reader sees the old file or the new one, also after a power cut. A link at `path` is replaced, not followed.
    Nothing is left behind where writing fails.

    Raises OSError, and whatever the function raises.
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
    """Add `text` to the end of a file, which is made if need be.

    Raises OSError, also where `path` is a link or no regular file (a pipe without a reader would be waited for).
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is not a regular file")
        file.write(text)


def name_beside(path: Path) -> Path:
    """A name in the folder of `path` that nobody can foresee; `.NAME.*.tmp`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def empty_folder(path: Path) -> None:
    """Make an empty folder at `path`, in the place of whatever is there. A link is removed, not followed.

    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.is_file():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()


def make_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Have `build` fill an empty folder, then move it to `folder`. Call it under a lock: removes what a killed process
    left of an earlier try. Raises OSError, and whatever `build` raises."""
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    beside = name_beside(folder)
    beside.mkdir()
    build(beside)
    beside.replace(folder)


def synchronize(path: Path) -> None:
    """Have the system bring a file's, or a folder's, content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_text(path: str | os.PathLike[str], where: str) -> str:
    """The text of a regular file.

    Args:
        path: the file.
        where: what it is to the user, such as "config ds.json"; begins the message.

    Raises:
        MolsConfigError: it is missing, a folder, a pipe or a device, cannot be read, or is not UTF-8.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise MolsConfigError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise MolsConfigError(f"{where}: {getattr(error, 'strerror', None) or error}") from error
    what = "it is a folder" if stat.S_ISDIR(mode) else "it is no regular file (a pipe or a device)"
    raise MolsConfigError(f"{where}: {what}; a file is needed")
