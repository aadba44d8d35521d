"""What both engines' adapters print and write down about the run. Engine-free."""

from __future__ import annotations

import contextlib
import logging
import platform
import sys
import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import TextIO

from mols_ds.errors import MolsWarning, printable, printable_lines

LOG = logging.getLogger("mols_ds")


def say(message: str) -> None:
    """Log at INFO where a handler takes it, else print: the group table and the alphas are seen.

    `logging.basicConfig()` leaves the level at WARNING, which would drop them. Who sets a level on the logger "mols_ds"
    itself has decided. Never raises, like `tell`.
    """
    if LOG.level != logging.NOTSET or (LOG.isEnabledFor(logging.INFO) and _taken()):
        with contextlib.suppress(Exception):  # a handler of the user's
            LOG.info("%s", printable_lines(message))
    else:
        tell(message)


def tell(message: str, file: TextIO | None = None) -> None:
    """Print lines at once; foreign text in them is made safe.

    Never raises: what one rank prints must not end it while the others wait (a closed pipe, a full disk).

    Args:
        message: one line or several.
        file: where to; stdout.
    """
    with contextlib.suppress(Exception):
        file = file or sys.stdout
        encoding = file.encoding or "utf-8"
        print(printable_lines(message).encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


class Aside:
    """Calls what one rank writes beside training. What fails there is a warning, once for each thing: an exception
    would leave the other ranks waiting in their next collective."""

    def __init__(self) -> None:
        self._failed: set[str] = set()

    def __call__(self, what: str, write: Callable[[], object]) -> bool:
        """Whether `write` has written `what`, which the warning names."""
        try:
            write()
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                line = f"{type(error).__name__}: {error}"
                warn_here(f"{what}: not written ({line}); training goes on", stacklevel=3)
            return False
        return True


def warn_here(message: str, stacklevel: int = 1) -> None:
    """Warn as a `MolsWarning` on this rank alone. Never raises.

    Where Python turns warnings into errors (-W error, PYTHONWARNINGS), the message is printed on stderr instead: the
    other ranks, which do not warn, would wait for this one in their next collective.

    Args:
        message: one line.
        stacklevel: as in warnings.warn; 1 is the caller of this function.
    """
    try:
        warnings.warn(message, MolsWarning, stacklevel=stacklevel + 1)
    except Exception:  # the warning itself, or what shows it
        tell(f"MolsWarning: {printable(message)}", sys.stderr)


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
