"""Folders of compiled kernels, whose code runs as this user: nobody else may own them or write to them."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from mols_ds.core.compile_locks import extensions_root
from mols_ds.errors import MolsConfigError

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
    """Why the kernels in `folder` may be somebody else's, or None; also where it is not there.

    Root's are taken: an administrator builds them for all.
    """
    try:
        linked, found = folder.lstat(), folder.stat()
    except OSError:
        return None
    if {linked.st_uid, found.st_uid} - {os.getuid(), 0}:
        return "belongs to another user"
    if stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by other users"
    return None


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
