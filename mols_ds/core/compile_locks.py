"""Find stale locks in torch's extension cache. A killed compilation leaves one; every later process waits for it."""

from __future__ import annotations

import os
import time
from pathlib import Path

STALE_SECONDS = 1800.0
"""Age in seconds from which a lock counts as stale. DeepSpeed's largest kernels compile in some minutes."""


def extensions_root() -> Path:
    """torch's extension cache: TORCH_EXTENSIONS_DIR, else ~/.cache/torch_extensions (torch/utils/cpp_extension.py)."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(given) if given else cache / "torch_extensions"


def stale_locks(root: Path | None = None, *, older: float = STALE_SECONDS) -> list[Path]:
    """List lock files older than a compilation can take, oldest first.

    Args:
        root: the cache; None: torch's.
        older: age in seconds.
    """
    root = root or extensions_root()
    found: list[tuple[float, Path]] = []
    for pattern in ("*/lock", "*/*/lock"):
        for path in root.glob(pattern):
            try:
                since = path.stat().st_mtime
            except OSError:  # the compilation has just ended
                continue
            if time.time() - since > older:
                found.append((since, path))
    return [path for _, path in sorted(found)]


def lock_problem(locks: list[Path]) -> tuple[str, str] | None:
    """Return (problem, remedy) for the result of `stale_locks`, None if it is empty."""
    if not locks:
        return None
    names = ", ".join(map(str, locks))
    found = f"{names}: left by a killed compilation; every process that needs this kernel waits forever"
    return found, f"if no process compiles now, remove: rm {' '.join(map(str, locks))}"
