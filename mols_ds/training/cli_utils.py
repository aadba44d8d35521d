"""Shared by all commands: argument parser, exit statuses, and one-line error messages on stderr.

Needs only the standard library: `mols-ds doctor` and `mols-ds launch` start even if torch, DeepSpeed or pydantic are
broken.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import NoReturn

from mols_ds.core.log import tell
from mols_ds.errors import MolsConfigError, MolsError, MolsTrainingError, printable

FAILED = 1
"""The command ran and its result is negative: a failed run, a problem in a check, a plan that does not fit."""
USER_MISTAKE = 2
"""A wrong argument, config, file or setting; one line on stderr names it."""
LARGEST = 2**53
"""Largest integer argument; larger floats are not exact."""
COMMAND_NOT_FOUND = 127
"""The command to start does not exist; the status of shells."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises MolsConfigError with one line, without usage, as for any other mistake."""

    def error(self, message: str) -> NoReturn:
        raise MolsConfigError(f"{message} (see {self.prog} --help)")


def _whole(text: str, least: int) -> int:
    value = int(text)  # argparse names text that is not a number
    if value < least:
        raise argparse.ArgumentTypeError(
            f"{text[:40]} is not at least {least}" if least else f"{text[:40]} is negative"
        )
    if value > LARGEST:
        raise argparse.ArgumentTypeError(f"{text[:40]} is above {LARGEST}")
    return value


def positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    return _whole(text, 1)


def not_negative(text: str) -> int:
    """Argument type: an integer of at least 0."""
    return _whole(text, 0)


def integer(least: int) -> Callable[[str], int]:
    """Argument type: an integer of at least `least`, which argparse calls "int"."""

    def convert(text: str) -> int:
        return _whole(text, least)

    convert.__name__ = "int"
    return convert


def above_zero(text: str) -> float:
    """Argument type: a finite number above 0, such as a rate or seconds."""
    return _number(text, lambda value: 0 < value < math.inf, "a finite number above 0")


def amount(text: str) -> float:
    """Argument type: a finite number of 0 or more, such as GiB."""
    return _number(text, lambda value: 0 <= value < math.inf, "a finite number of 0 or more")


def share(text: str) -> float:
    """Argument type: a number in [0, 1)."""
    return _number(text, lambda value: 0 <= value < 1, "in [0, 1)")


def _number(text: str, fits: Callable[[float], bool], words: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {text[:40]!r}") from None
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text[:40]} is not {words}")
    return value


def add_timeout(parser: argparse._ActionsContainer) -> None:
    """Add --timeout to a parser or an argument group."""
    parser.add_argument(
        "--timeout", type=positive, metavar="SECONDS",
        help="seconds after which a collective fails that a rank does not join (default: the backend's 10 or 30 min)",
    )  # fmt: skip


def add_saving(parser: argparse._ActionsContainer) -> None:
    """Add --save-every, --keep-last, --keep-every and --log-every to a parser or an argument group."""
    add = parser.add_argument
    add("--save-every", type=not_negative, default=0, help="steps between checkpoints (0: the end only)")
    add("--keep-last", type=positive, metavar="N", help="keep only the newest N checkpoints (default: all)")
    add("--keep-every", type=positive, metavar="M", help="keep those of every M-th step besides")
    add("--log-every", type=positive, default=1, help="steps between lines of the log and of metrics.jsonl")


def print_line(program: str, message: object) -> None:
    """Print `program: message` as one `printable` line on stderr."""
    tell(f"{program}: {printable(message)}", sys.stderr)


def status_of(error: MolsError) -> int:
    """Return the exit status for an error: FAILED for a run that could not continue, else USER_MISTAKE."""
    return FAILED if isinstance(error, MolsTrainingError) else USER_MISTAKE


def shell_status(returncode: int) -> int:
    """Return the exit status for a process's return code: 128 + n if signal n ended it, as shells do."""
    return 128 - returncode if returncode < 0 else returncode


def run_program(program: str, command: Callable[[], int], *, silent: bool = False) -> int:
    """Run a command of one process.

    Args:
        program: name at the start of the line on stderr.
        command: returns the exit status.
        silent: print nothing, because another rank has the same error and prints it.

    Returns:
        The result of `command`, or the status of its MolsError, which is printed in one line on stderr.
    """
    try:
        return command()
    except MolsError as error:
        if not silent:
            print_line(program, error)
        return status_of(error)
