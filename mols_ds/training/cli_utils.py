"""What all commands share: the parser, the exit statuses, and the one line on stderr that says what is wrong.

Needs the standard library only: `mols-ds doctor` and `mols-ds launch` start where torch, DeepSpeed or pydantic are
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
"""The command ran, and its answer is no: a run failed, a check found a problem, a plan does not fit."""
USER_MISTAKE = 2
"""A wrong argument, config, file or setting; one line on stderr says which."""
LARGEST = 2**53
"""Of a whole number: beyond it floats are not exact."""
COMMAND_NOT_FOUND = 127
"""The command that was to be started is not there; the status that shells give."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are user's mistakes like all others: MolsConfigError, one line, no usage."""

    def error(self, message: str) -> NoReturn:
        raise MolsConfigError(f"{message} (see {self.prog} --help)")


def _whole(text: str, least: int) -> int:
    value = int(text)  # what is no number argparse names itself
    if value < least:
        raise argparse.ArgumentTypeError(
            f"{text[:40]} is not at least {least}" if least else f"{text[:40]} is negative"
        )
    if value > LARGEST:
        raise argparse.ArgumentTypeError(f"{text[:40]} is above {LARGEST}")
    return value


def positive(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    return _whole(text, 1)


def not_negative(text: str) -> int:
    """Argument type: a whole number of at least 0."""
    return _whole(text, 0)


def integer(least: int) -> Callable[[str], int]:
    """Argument type: a whole number of at least `least`, which argparse calls "int"."""

    def convert(text: str) -> int:
        return _whole(text, least)

    convert.__name__ = "int"
    return convert


def above_zero(text: str) -> float:
    """Argument type: a finite number above 0, as a rate or seconds."""
    return _number(text, lambda value: 0 < value < math.inf, "a finite number above 0")


def amount(text: str) -> float:
    """Argument type: a finite number of 0 or more, as GiB that are asked for."""
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
    """Adds --timeout to a parser or a group of one."""
    parser.add_argument(
        "--timeout", type=positive, metavar="SECONDS",
        help="a collective that a rank does not join fails after this time (default: the backend's 10 or 30 minutes)",
    )  # fmt: skip


def print_line(program: str, message: object) -> None:
    """Prints `program: message` as one line on stderr, as `printable` makes it."""
    tell(f"{program}: {printable(message)}", sys.stderr)


def status_of(error: MolsError) -> int:
    """Exit status of a command that `error` ended: FAILED for a run that could not go on, else USER_MISTAKE."""
    return FAILED if isinstance(error, MolsTrainingError) else USER_MISTAKE


def shell_status(returncode: int) -> int:
    """Exit status for the return code of a process: 128 + n where signal n ended it, as shells have it."""
    return 128 - returncode if returncode < 0 else returncode


def run_program(program: str, command: Callable[[], int], *, silent: bool = False) -> int:
    """Runs a command of one process.

    Args:
        program: its name, which begins the line on stderr.
        command: returns the exit status.
        silent: prints nothing, because another rank meets the same mistake and prints it.

    Returns:
        What `command` returns; the status of its MolsError, which is printed in one line on stderr.
    """
    try:
        return command()
    except MolsError as error:
        if not silent:
            print_line(program, error)
        return status_of(error)
