"""Progress output: a bar on a terminal, or some lines in a log file."""

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mols_ds.core.log import GuardedWriter, tell
from mols_ds.errors import printable

LINES = 10
"""Lines of a whole run without a terminal."""


class Progress:
    """Progress of one arm. Silent on ranks that do not show it."""

    def __init__(self, name: str, steps: int, shown: bool) -> None:
        self.name, self.steps, self.shown = name, steps, shown
        self.console = Console()
        self._bar: Bar | None = None
        self._began = time.monotonic()
        self._val_loss: float | None = None
        if shown and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[state]}"))
            self._bar = Bar(*columns, *times, console=self.console)
            self._task = self._bar.add_task(escape(printable(name)), total=steps, state="")
            GuardedWriter()("progress", self._bar.start)

    def probing(self, count: int) -> None:
        """Show that `count` batches were measured so far without an update."""
        if self._bar is not None:
            self._bar.update(self._task, state=f"measuring gradients: batch {count}")

    def update(self, step: int, loss: float, val_loss: float | None, phase: str) -> None:
        """Show that step `step` is done."""
        if val_loss is not None:
            self._val_loss = val_loss
        state = f"loss {loss:.3f}"
        state += f", held-out {self._val_loss:.3f}" if self._val_loss is not None else ""
        state += f", MoLS {phase}" if phase != "disabled" else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, state=state)
        elif self.shown and (step * LINES // self.steps != (step - 1) * LINES // self.steps or step == self.steps):
            seconds = time.monotonic() - self._began
            tell(f"{self.name}: step {step}/{self.steps}, {seconds:.0f} s, {state}")

    def close(self) -> None:
        """Restore the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
