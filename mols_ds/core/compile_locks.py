"""Locks that a killed compilation leaves in torch's cache of extensions: every later process waits for them."""

from __future__ import annotations

import os
import time
from pathlib import Path

LONGEST = 1800.0
"""Seconds after which a lock is taken for stale: the largest of DeepSpeed's kernels compile in some minutes."""


def extensions_root() -> Path:
    """torch's cache of extensions: TORCH_EXTENSIONS_DIR, else ~/.cache/torch_extensions.

    (torch/utils/cpp_extension.py, file_baton.py.)
    """
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(given) if given else cache / "torch_extensions"


def stale_locks(root: Path | None = None, *, older: float = LONGEST) -> list[Path]:
    """The lock files that are older than a compilation takes, oldest first.

    Args:
        root: the cache; None is torch's.
        older: seconds.
    """
    root = root or extensions_root()
    found: list[tuple[float, Path]] = []
    for pattern in ("*/lock", "*/*/lock"):
        for path in root.glob(pattern):
            try:
                since = path.stat().st_mtime
            except OSError:  # its compilation has just ended
                continue
            if time.time() - since > older:
                found.append((since, path))
    return [path for _, path in sorted(found)]


def lock_problem(locks: list[Path]) -> tuple[str, str] | None:
    """(what is found, what to do) of `stale_locks`; None without any."""
    if not locks:
        return None
    names = ", ".join(map(str, locks))
    found = f"{names}: left by a compilation that was killed; a process that needs this kernel waits for ever"
    return found, f"remove it where nothing is compiled now: rm {' '.join(map(str, locks))}"
