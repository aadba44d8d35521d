"""Progress output: one line for each logged step, and a bar below them on a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from mols_ds.core.log import GuardedWriter, tell
from mols_ds.errors import printable

SECONDS_BETWEEN_LINES = 20.0
PROBE_LINES = 4
"""Lines of a calibration in mode "probe", besides the first."""


class Progress:
    """Progress of one arm. Silent on ranks that do not show it."""

    def __init__(self, name: str, steps: int, shown: bool) -> None:
        self.name, self.steps, self.shown = name, steps, shown
        self.console = Console()
        self._bar: Bar | None = None
        self._began = time.monotonic()
        if shown and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[state]}"))
            self._bar = Bar(*columns, *times, console=self.console)
            self._task = self._bar.add_task(escape(printable(name)), total=steps, state="")
            GuardedWriter()("progress", self._bar.start)

    def probing(self, count: int, samples: int) -> None:
        """Show that `count` of (at most) `samples` batches were measured so far without an update."""
        state = f"measuring gradients: batch {count} of {samples}"
        if self._bar is not None:
            self._bar.update(self._task, state=state)
        if count == 1 or count % max(1, samples // PROBE_LINES) == 0:
            self._say(state)

    def update(self, line: Mapping[str, Any]) -> None:
        """Show a line of the metrics."""
        if self._bar is not None:
            self._bar.update(self._task, completed=line["step"], state="")
        seconds = time.monotonic() - self._began
        self._say(f"step {line['step']}/{self.steps}, {seconds:.0f} s, {', '.join(parts(line))}")

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(f"{escape(printable(self.name))}: {escape(text)}", highlight=False, soft_wrap=True)
        elif self.shown:
            tell(f"{self.name}: {text}")

    def close(self) -> None:
        """Restore the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Tokenizing:
    """Progress of tokenizing `total` bytes of text: a bar on a terminal, else a line now and then. As a context."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self._began = self._said = time.monotonic()
        self._bar = Bar(TextColumn(f"tokenizing {escape(printable(name))}"), BarColumn(), DownloadColumn(),
                        TransferSpeedColumn(), TimeRemainingColumn(), transient=True)  # fmt: skip
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Tokenizing:
        if self._bar.console.is_terminal:
            GuardedWriter()("progress", self._bar.start)
        return self

    def __call__(self, characters: int) -> None:
        """Count tokenized characters."""
        self.done += characters
        self._bar.update(self._task, completed=min(self.done, self.total))
        if not self._bar.console.is_terminal and time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            tell(f"tokenizing {self.name}: {self.done / 1e6:,.0f} MB of text, of {self.total / 1e6:,.0f} MB on disk")

    def __exit__(self, *_: object) -> None:
        if self._bar.console.is_terminal:  # elsewhere it prints an empty line
            self._bar.stop()
        seconds = time.monotonic() - self._began
        if seconds > SECONDS_BETWEEN_LINES:
            rate = self.done / 1e6 / seconds
            tell(f"tokenized {self.name}: {self.done / 1e6:,.0f} MB in {seconds:.0f} s ({rate:.2f} MB/s)")


def parts(line: Mapping[str, Any]) -> list[str]:
    """Return the values of a line of the metrics as text."""
    texts = [f"loss {line['loss']:.3f}"]
    if "val_loss" in line:
        texts.append(f"held-out {line['val_loss']:.3f}")
    texts.append(f"rate {line['lr']:.3g}")
    if "grad_norm" in line:
        texts.append(f"gradient norm {line['grad_norm']:.3g}")
    texts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
    texts.append(f"{line['memory_bytes'] / 2**30:.2f} GiB")
    if "mfu" in line:
        texts.append(f"MFU {line['mfu']:.1%}")
    if line["phase"] != "disabled":
        texts.append(f"MoLS {line['phase']}")
    return texts
