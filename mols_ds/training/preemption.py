"""Preemption: on SIGTERM, SIGUSR1 or Ctrl-C, all ranks save a checkpoint at the same step and exit with status 0."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals of schedulers."""
LISTENED = (*SIGNALS, signal.SIGINT)
Handler = Callable[[int, FrameType | None], object] | int | None
"""Result of `signal.signal`."""


class Preempted(Exception):
    """A signal ended the run early; its checkpoint is saved. Not an error: exit status 0."""


class StopRequest:
    """Listen for `LISTENED` in a `with` block. Only the main thread of a process can listen.

    The handler only records the signal: the current step, collective or save ends first. After `Preempted` the process
    ignores further signals: it is ending, and a second signal (a scheduler sends SIGTERM after SIGUSR1, two hosts may
    both signal a rank) would make its exit a failure. A second SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        """Number of the signal that this rank heard, or 0."""
        self._former: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in LISTENED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ending = isinstance(error, Preempted)
        for number, handler in self._former.items():
            after = signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN
            signal.signal(number, after if ending else handler or signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = self.signal_number or number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def agreed(self, largest: Callable[[float], float]) -> str | None:
        """Return the name of the signal of any rank, the same on every rank, or None. Collective.

        largest: returns the maximum over ranks. Signals reach ranks at different steps, and some ranks never.
        """
        number = int(largest(float(self.signal_number)))
        return signal.Signals(number).name if number else None
