"""What both engines' adapters print and write down about the run. Engine-free."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterable
from importlib import metadata

LOG = logging.getLogger("mols_ds")


def say(message: str) -> None:
    """Log at INFO; where nobody has configured logging, print, so that the group table and the alphas are seen."""
    if LOG.hasHandlers() or LOG.level != logging.NOTSET:
        LOG.info(message)
    else:
        print(message, flush=True)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of what the numbers depend on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in ("mols-ds", "torch", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
