"""The parser, the exit statuses and the one line on stderr that all commands share."""

from __future__ import annotations

import argparse
import signal

import pytest

from mols_ds.errors import MolsCheckpointError, MolsConfigError, MolsError, MolsTrainingError
from mols_ds.training.cli_utils import (
    FAILED,
    USER_MISTAKE,
    Parser,
    add_timeout,
    not_negative,
    positive,
    run_program,
    shell_status,
)


def parser() -> Parser:
    parser = Parser(prog="tool")
    add_timeout(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("count").add_argument("--number", type=positive)
    commands.add_parser("start").add_argument("--number", type=not_negative)
    return parser


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["count", "--nmber", "1"], "unrecognized arguments: --nmber 1 (see tool --help)"),
        (["count", "--number", "0"], "argument --number: 0 is not at least 1 (see tool count --help)"),
        (["start", "--number", "-1"], "argument --number: -1 is negative (see tool start --help)"),
        (["--timeout", "x", "start"], "argument --timeout: invalid positive value: 'x' (see tool --help)"),
        ([], "the following arguments are required: COMMAND (see tool --help)"),
    ],
)
def test_a_wrong_argument_is_a_config_error(argv: list[str], message: str) -> None:
    with pytest.raises(MolsConfigError) as caught:
        parser().parse_args(argv)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MolsConfigError("two\n  lines"), USER_MISTAKE),
        (MolsCheckpointError("two lines"), USER_MISTAKE),
        (MolsError("two lines"), USER_MISTAKE),
        (MolsTrainingError("two\nlines"), FAILED),
    ],
)
def test_an_error_is_one_line_and_a_status(error: MolsError, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise error

    assert run_program("tool", command) == status
    assert capsys.readouterr() == ("", "tool: two lines\n")
    assert run_program("tool", command, silent=True) == status
    assert capsys.readouterr() == ("", "")


def test_other_results_and_errors_pass() -> None:
    assert run_program("tool", lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        run_program("tool", lambda: 1 // 0)


def test_a_process_that_a_signal_ended_has_the_status_that_shells_give() -> None:
    assert [shell_status(code) for code in (0, 3, -signal.SIGTERM)] == [0, 3, 143]


def test_the_statuses_are_those_that_scripts_rely_on() -> None:
    assert (FAILED, USER_MISTAKE) == (1, 2)
    assert issubclass(Parser, argparse.ArgumentParser)
