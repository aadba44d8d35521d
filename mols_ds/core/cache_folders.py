"""Check the owner of kernel caches. Compiled kernels run as this user, so nobody else may own or write the folders."""

from __future__ import annotations

import grp
import os
import pwd
import stat
import tempfile
from pathlib import Path

from mols_ds.core.compile_locks import extensions_root
from mols_ds.errors import MolsConfigError

BY_GROUP = "can be written by its group"
INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"


def kernel_caches() -> dict[str, Path]:
    """Environment variable -> cache folder that torch and Triton use now."""
    triton = Path(os.environ.get("TRITON_HOME") or "~").expanduser() / ".triton"
    return {
        "TORCH_EXTENSIONS_DIR": extensions_root(),
        "TRITON_CACHE_DIR": Path(os.environ.get("TRITON_CACHE_DIR") or triton),
        INDUCTOR: Path(os.environ.get(INDUCTOR) or own_root() / "inductor"),
    }


def own_root() -> Path:
    """This user's folder on the node's local disk; launch/caches.env uses the same name."""
    return Path(tempfile.gettempdir()) / f"mols-{os.getuid()}"


def foreign_problem(folder: Path) -> str | None:
    """Say why another user could have written kernels in `folder`, or return None.

    Accepts folders of root: an administrator builds kernels for everybody. Checks the nearest existing parent where
    `folder` does not exist. A shared parent such as /tmp is fine: its sticky bit keeps others from renaming folders.
    """
    below = own_root() in folder.parents and foreign_problem(own_root())
    if below:
        return f"is in {own_root()}, which {below}"
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    try:
        linked, found = there.lstat(), there.stat()
    except OSError:
        return "cannot be read"
    if {linked.st_uid, found.st_uid} - {os.getuid(), 0}:
        return "belongs to another user"
    common = there != folder and found.st_mode & stat.S_ISVTX
    if found.st_mode & stat.S_IWOTH and not common:
        return "can be written by other users"
    if found.st_mode & stat.S_IWGRP and not common and not _is_private(found.st_gid):
        return BY_GROUP
    return None


def _is_private(group: int) -> bool:
    """Whether this user is the only member of a group. Many systems create such a group for each user (umask 002)."""
    try:
        user, found = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == user and set(found.gr_mem) <= {user}


def cache_problems() -> list[tuple[str, str]]:
    """List (problem, remedy) of each kernel cache that another user could have written."""
    return [
        (
            f"{variable}: {folder} {problem}, and its kernels run as this user",
            f"remove it, or chmod go-w {folder}, or name another folder by {variable}",
        )
        for variable, folder in kernel_caches().items()
        if (problem := foreign_problem(folder)) is not None
    ]


def use_own_inductor_cache() -> None:
    """Set TORCHINDUCTOR_CACHE_DIR, if it is not set, to a folder that only this user can write.

    torch's default (torchinductor_USER in the shared temporary folder) can be created by anybody.

    Raises:
        MolsConfigError: another user created the folder.
    """
    if os.environ.get(INDUCTOR):
        return
    root = own_root()
    try:
        root.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise MolsConfigError(f"{root}: {error.strerror or error}; name another folder by {INDUCTOR}") from error
    problem = "is a link" if root.is_symlink() else foreign_problem(root)
    if problem is not None:
        raise MolsConfigError(
            f"{root} {problem}: compiled kernels in it are not safe; name another folder by {INDUCTOR}"
        )
    os.environ[INDUCTOR] = str(root / "inductor")
