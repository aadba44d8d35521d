"""Print messages of both engines' adapters; list package versions."""

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
    """Log at INFO if a handler accepts it, else print: users must see the group table and the alphas.

    `logging.basicConfig()` leaves the level at WARNING, which would drop them. A level set on the logger "mols_ds" is
    respected. Never raises, like `tell`.
    """
    if LOG.level != logging.NOTSET or (LOG.isEnabledFor(logging.INFO) and _taken()):
        with contextlib.suppress(Exception):  # a user's handler may raise
            LOG.info("%s", printable_lines(message))
    else:
        tell(message)


def tell(message: str, file: TextIO | None = None) -> None:
    """Print lines at once and escape control characters.

    Never raises (closed pipe, full disk): the other ranks would wait for this one.

    Args:
        message: one or more lines.
        file: the stream; None: stdout.
    """
    with contextlib.suppress(Exception):
        file = file or sys.stdout
        encoding = file.encoding or "utf-8"
        print(printable_lines(message).encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


class GuardedWriter:
    """Run writes of one rank beside training. Turns a failure into one warning per item: an exception would leave the
    other ranks waiting in their next collective."""

    def __init__(self) -> None:
        self._failed: set[str] = set()

    def __call__(self, what: str, write: Callable[[], object]) -> bool:
        """Call `write`. Returns whether it succeeded; the warning names `what`."""
        try:
            write()
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                line = f"{type(error).__name__}: {error}"
                warn_here(f"{what}: not written ({line}); training continues", stacklevel=3)
            return False
        return True


def warn_here(message: str, stacklevel: int = 1) -> None:
    """Issue a `MolsWarning` on this rank alone. Never raises.

    If Python turns warnings into errors (-W error, PYTHONWARNINGS), prints on stderr instead: the other ranks do not
    warn and would wait for this one in their next collective.

    Args:
        message: one line.
        stacklevel: as in warnings.warn; 1 is the caller of this function.
    """
    try:
        warnings.warn(message, MolsWarning, stacklevel=stacklevel + 1)
    except Exception:  # the warning itself, or a hook that shows it
        tell(f"MolsWarning: {printable(message)}", sys.stderr)


def _taken() -> bool:
    """Whether a handler of this logger or of a parent accepts INFO."""
    logger: logging.Logger | None = LOG
    while logger is not None:
        if any(handler.level <= logging.INFO for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python, torch, this package and `packages`, if installed."""
    found = {"python": platform.python_version()}
    for package in ("mols-ds", "torch", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
