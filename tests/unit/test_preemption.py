"""Signals that ask a run to end."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from mols_ds.training.preemption import SIGNALS, StopRequest


def test_nothing_heard_is_no_stop() -> None:
    with StopRequest() as stop:
        assert stop.agreed(float) is None


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.agreed(float) == number.name
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_signal_of_another_rank_counts() -> None:
    with StopRequest() as stop:
        assert stop.agreed(lambda mine: max(mine, float(signal.SIGUSR1))) == "SIGUSR1"


def test_a_thread_hears_none_and_takes_no_handler() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work() -> None:
        with StopRequest() as stop:
            found.append((stop.agreed(float), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]
