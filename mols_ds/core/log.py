"""What both engines' adapters print and write down about the run. Engine-free."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterable
from importlib import metadata

LOG = logging.getLogger("mols_ds")


def say(message: str) -> None:
    """Log at INFO where a handler takes it, else print: the group table and the alphas are seen.

    `logging.basicConfig()` leaves the level at WARNING, which would drop them. Who sets a level on the logger "mols_ds"
    itself has decided.
    """
    if LOG.level != logging.NOTSET or (LOG.isEnabledFor(logging.INFO) and _taken()):
        LOG.info(message)
    else:
        print(message, flush=True)


def _taken() -> bool:
    """Whether a handler of this logger, or of those above it, takes INFO."""
    logger: logging.Logger | None = LOG
    while logger is not None:
        if any(handler.level <= logging.INFO for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of what the numbers depend on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in ("mols-ds", "torch", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
