"""Folders of compiled kernels, whose code runs as this user: nobody else may own them or write to them."""

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
    """Variable -> the folder that torch and Triton use now."""
    triton = Path(os.environ.get("TRITON_HOME") or "~").expanduser() / ".triton"
    return {
        "TORCH_EXTENSIONS_DIR": extensions_root(),
        "TRITON_CACHE_DIR": Path(os.environ.get("TRITON_CACHE_DIR") or triton),
        INDUCTOR: Path(os.environ.get(INDUCTOR) or own_root() / "inductor"),
    }


def own_root() -> Path:
    """This user's folder on this node's own disk, as launch/caches.env names it."""
    return Path(tempfile.gettempdir()) / f"mols-{os.getuid()}"


def foreign_problem(folder: Path) -> str | None:
    """Why the kernels in `folder` may be somebody else's, or None.

    Root's are taken: an administrator builds them for all. Where the folder is not there yet, the one that it will be
    made in decides; a common one such as /tmp, in which nobody can rename what others made (the sticky bit), will do.
    """
    below = own_root() in folder.parents and foreign_problem(own_root())
    if below:
        return f"lies in {own_root()}, which {below}"
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    try:
        linked, found = there.lstat(), there.stat()
    except OSError:
        return "cannot be looked at"
    if {linked.st_uid, found.st_uid} - {os.getuid(), 0}:
        return "belongs to another user"
    common = there != folder and found.st_mode & stat.S_ISVTX
    if found.st_mode & stat.S_IWOTH and not common:
        return "can be written by other users"
    if found.st_mode & stat.S_IWGRP and not common and not _is_private(found.st_gid):
        return BY_GROUP
    return None


def _is_private(group: int) -> bool:
    """Whether a group is this user's own, as many systems make one for each user (umask 002)."""
    try:
        user, found = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == user and set(found.gr_mem) <= {user}


def cache_problems() -> list[tuple[str, str]]:
    """(what is found, what to do) of each cache of kernels that may hold somebody else's."""
    return [
        (
            f"{variable}: {folder} {problem}, and its kernels run as this user",
            f"remove it, or chmod go-w {folder}, or name another folder by {variable}",
        )
        for variable, folder in kernel_caches().items()
        if (problem := foreign_problem(folder)) is not None
    ]


def use_own_inductor_cache() -> None:
    """Set TORCHINDUCTOR_CACHE_DIR, where it is not set, to a folder that is this user's alone.

    torch's own default is a name in the common temporary folder that anybody can make first (torchinductor_USER).

    Raises MolsConfigError where somebody else has made the folder.
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
            f"{root} {problem}, and it would hold compiled kernels: name another folder by {INDUCTOR}"
        )
    os.environ[INDUCTOR] = str(root / "inductor")
