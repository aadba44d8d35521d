"""Messages of MoLS are visible under any logging configuration."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import pytest

from mols_ds.core.log import LOG, say


@contextlib.contextmanager
def fresh_logging() -> Iterator[logging.Logger]:
    """The root logger as a fresh program has it, without pytest's own handlers."""
    root, handlers, levels = logging.root, logging.root.handlers, (logging.root.level, LOG.level)
    root.handlers = []
    root.setLevel(logging.WARNING)
    LOG.setLevel(logging.NOTSET)
    try:
        yield root
    finally:
        root.handlers = handlers
        root.setLevel(levels[0])
        LOG.setLevel(levels[1])


@pytest.mark.parametrize("level", [None, logging.WARNING, logging.INFO])
def test_it_is_seen_once(capsys: pytest.CaptureFixture[str], level: int | None) -> None:
    """Without a configuration, under `logging.basicConfig()` and under `basicConfig(level=INFO)`."""
    with fresh_logging():
        if level is not None:
            logging.basicConfig(level=level)
        say("the alphas")
    out, err = capsys.readouterr()
    assert (out + err).count("the alphas") == 1
    assert ("the alphas" in err) == (level == logging.INFO)


def test_a_handler_that_takes_warnings_alone_is_not_enough(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    with fresh_logging() as root:
        root.addHandler(handler)
        root.setLevel(logging.DEBUG)
        say("the alphas")
    assert capsys.readouterr().out == "the alphas\n"


def test_a_level_on_our_own_logger_is_the_user_s_decision(capsys: pytest.CaptureFixture[str]) -> None:
    with fresh_logging():
        logging.basicConfig()
        LOG.setLevel(logging.WARNING)
        say("the alphas")
    assert capsys.readouterr() == ("", "")
