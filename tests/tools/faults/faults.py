"""What can be done to a run, in which phase, and how a rank does it to itself.

A fault fires once, in the first launch only, at the n-th call of the training loop's step (an iteration that MoLS only
measures counts), or in the save that comes next. It leaves a mark, so that a fault that never fired is not taken for
one that was survived.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal[
    "kill",
    "stop",
    "term",
    "delay",
    "nan",
    "inf",
    "save-files",
    "save-rename",
    "save-latest",
    "full",
    "flip",
    "truncate",
]
Phase = Literal["waiting", "calibrating", "end", "ramping", "fixed"]

FAULTS: dict[Kind, str] = {
    "kill": "SIGKILL of a rank in the middle of a step",
    "stop": "SIGSTOP of a rank in the middle of a step; the others must give up by themselves",
    "term": "SIGTERM to one rank in the middle of a step, as before a pre-emption: all save and end",
    "delay": "a rank sleeps in the middle of a step, for less than the time limit",
    "nan": "NaN in a gradient of one rank",
    "inf": "Inf in a gradient of one rank",
    "save-files": "SIGKILL of a rank between two writes of a checkpoint",
    "save-rename": "SIGKILL before the checkpoint gets its final name",
    "save-latest": "SIGKILL before `latest` names the checkpoint",
    "full": "the disk is full in the middle of a save, and still at the first restart",
    "flip": "SIGKILL, and one byte of the newest checkpoint is flipped",
    "truncate": "SIGKILL, and a file of the newest checkpoint is cut off",
}
PHASES: tuple[Phase, ...] = ("waiting", "calibrating", "end", "ramping", "fixed")

# Of the loop's calls, 1 to 5 wait, 6 to 10 are measured (alphas come at the end of the 10th), 11 to 13 are the ramp,
# 14 to 18 have fixed rates. Every second update is saved: a fault costs updates, and an older checkpoint is there.
START, SAMPLES, RAMP, CALLS, SAVE_EVERY = 5, 5, 3, 18, 2
IN_STEP: dict[Phase, int] = {"waiting": 5, "calibrating": 9, "end": 10, "ramping": 13, "fixed": 17}
IN_SAVE: dict[Phase, int] = {"waiting": 3, "calibrating": 7, "end": 9, "ramping": 11, "fixed": 15}
STRIKES: tuple[Kind, ...] = ("kill", "stop", "term", "delay", "flip", "truncate")
DELAY_SECONDS = 1.5
LEFT_BYTES = 24 * 1024  # of the full disk: less than any checkpoint, more than a line of metrics
BALLAST = "ballast"


@dataclass(frozen=True)
class Fault:
    """One fault of one launch. `ranks`: who does it; `mark`: the file that records that and when it was done."""

    kind: Kind
    phase: Phase
    ranks: tuple[int, ...]
    mark: str

    @property
    def in_save(self) -> bool:
        return self.kind.startswith("save") or self.kind == "full"

    @property
    def call(self) -> int:
        """The call of the loop's step at which it fires, or from which on the next save is hit."""
        return (IN_SAVE if self.in_save else IN_STEP)[self.phase]


def fired(mark: str | Path) -> float | None:
    """When a fault fired, by this machine's monotonic clock; None where it did not."""
    path = Path(mark)
    return float(path.read_text("utf-8")) if path.is_file() else None


class Injection:
    """Does `fault` to this process. The engine's adapter calls the methods at the places that they are named for."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.pid, self.calls = fault, os.getpid(), 0
        self.saving = self.done = False
        self.writes = 0

    def _due(self, *kinds: Kind) -> bool:
        return not self.done and self.fault.kind in kinds and self.calls == self.fault.call

    def _mark(self) -> None:
        self.done = True
        beside = Path(f"{self.fault.mark}.{self.pid}")
        beside.write_text(repr(time.monotonic()), "utf-8")
        beside.replace(self.fault.mark)

    def _strike(self) -> None:
        """What ends, stops or delays this process."""
        self._mark()
        if self.fault.kind == "delay":
            time.sleep(DELAY_SECONDS)
        elif self.fault.kind in ("stop", "term"):
            os.kill(self.pid, signal.SIGSTOP if self.fault.kind == "stop" else signal.SIGTERM)
        else:  # a checkpoint's writer may be a child of this rank
            os.kill(self.pid, signal.SIGKILL)
            time.sleep(3600)

    # -- places

    def before_step(self, parameters: Any) -> None:
        """A call of the loop's step begins."""
        self.calls += 1
        if self._due("nan", "inf"):
            bad = math.nan if self.fault.kind == "nan" else math.inf
            self.done = True
            handle: Any = None

            def poison(gradient: Any) -> Any:
                handle.remove()
                self._mark()
                gradient = gradient.clone()
                gradient.view(-1)[0] = bad
                return gradient

            handle = next(iter(parameters)).register_hook(poison)

    def before_update(self) -> None:
        """The gradients are there, the optimizer's step begins."""
        if self.fault.phase != "end" and self._due(*STRIKES):
            self._strike()

    def before_report(self) -> None:
        """The alphas are known and the accumulators freed."""
        if self.fault.phase == "end" and self._due(*STRIKES):
            self._strike()

    def save(self, save: Callable[[], None], out: Path) -> None:
        """A checkpoint is to be written."""
        if self.done or not self.fault.in_save or self.calls < self.fault.call:
            save()
            return
        if self.fault.kind == "full":
            fill(out)
            self._mark()
        self.saving = True
        try:
            save()
        finally:
            self.saving = False

    def before_write(self) -> None:
        """A tensor or file of a checkpoint is to be written; the first ones of a save go through."""
        if self.saving and self.fault.kind == "save-files":
            self.writes += 1
            if self.writes > 1:
                self._strike()

    def before_rename(self, source: str, target: str) -> None:
        """A file or folder gets another name."""
        if not self.saving:
            return
        names_latest = os.path.basename(target) == "latest"
        if self.fault.kind == "save-latest" and names_latest:
            self._strike()
        if self.fault.kind == "save-rename" and os.path.basename(source).endswith(".partial"):
            self._strike()


def fill(folder: Path) -> None:
    """Take all but LEFT_BYTES of the file system of `folder`, which must be a small one of the test's own."""
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    if free > 1 << 28:
        raise RuntimeError(f"{folder} has {free} free bytes: not the small file system that a test may fill")
    with (folder / BALLAST).open("wb") as file:
        file.write(bytes(max(0, free - LEFT_BYTES)))
