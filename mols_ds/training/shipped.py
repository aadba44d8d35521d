"""Files that ship beside the package: configs, studies (not their results), launch files, examples. setup.py puts them
into the wheel."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from mols_ds.errors import MolsConfigError

SHIPPED = ("configs", "studies", "launch", "examples", "train.py", "finetune.py", "train_megatron.py")
"""Folders and scripts at the top of the checkout. Keep equal to the list in setup.py."""
PACKAGE = Path(__file__).resolve().parents[1]


def shipped_root() -> Path:
    """Return the folder with `SHIPPED`: `mols_ds/shipped` in an installed wheel, else the checkout."""
    inside = PACKAGE / "shipped"
    return inside if inside.is_dir() else PACKAGE.parent


def shipped_files(patterns: Sequence[str] = ()) -> list[str]:
    """List paths relative to `shipped_root`, sorted. Patterns (`fnmatch`, or a folder) select some.

    Raises:
        MolsConfigError: a pattern matches nothing.
    """
    root = shipped_root()
    tops = [root / name for name in SHIPPED]
    files = [file for top in tops for file in ([top] if top.is_file() else top.rglob("*"))]
    found = [file.relative_to(root) for file in files if file.is_file()]
    names = sorted(file.as_posix() for file in found if not {"__pycache__", "results"} & set(file.parts))
    if not patterns:
        return names
    chosen: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if fnmatch(name, pattern) or name.startswith(f"{pattern.rstrip('/')}/")}
        if not matching:
            raise MolsConfigError(f"configs: no file matches {pattern}; `mols-ds configs` lists them")
        chosen |= matching
    return sorted(chosen)


def copy_shipped(names: Sequence[str], folder: Path) -> list[Path]:
    """Copy `shipped_files` into `folder` with their subfolders and modes. Return the copies.

    Raises:
        MolsConfigError: a target exists with other content (nothing is copied), or a file cannot be written.
    """
    pairs = [(shipped_root() / name, folder / name) for name in names]
    for source, target in pairs:
        if os.path.lexists(target) and not (target.is_file() and filecmp.cmp(source, target, shallow=False)):
            raise MolsConfigError(f"configs: {target} exists and differs; nothing was copied, name another folder")
    try:
        for source, target in pairs:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    except OSError as error:
        raise MolsConfigError(f"configs: {error.filename}: {error.strerror or error}") from error
    return [target for _, target in pairs]
