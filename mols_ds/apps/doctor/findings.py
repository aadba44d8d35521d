"""Findings of the doctor as text, JSON and exit status. Imports only the standard library (and `mols_ds.errors`), so
that it works in a broken installation."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from mols_ds.errors import MolsError, printable

Level = Literal["ok", "note", "warning", "problem"]
LEVELS: tuple[Level, ...] = get_args(Level)
SCHEMA = 1
COLORS: dict[Level, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "red"}


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        level: ok; note (for information); warning (runs, but probably not as intended); problem (will not run).
        name: dotted, stable across releases for scripts: "deepspeed.version", "config.schedule".
        found: the observation.
        fix: what to do; "" if nothing.
    """

    level: Level
    name: str
    found: str
    fix: str = ""


@dataclass
class Findings:
    """Findings in the order of the checks."""

    items: list[Finding] = field(default_factory=list)

    def add(self, level: Level, name: str, found: str, fix: str = "") -> None:
        """Add one finding. Makes foreign text printable, on one line."""
        self.items.append(Finding(level, printable(name), printable(found), printable(fix)))

    def refused(self, name: str, error: MolsError, fix: str) -> None:
        """Add a problem from an error of this package. Its message may end with the fix; else use `fix`."""
        what, way_out = split_way_out(str(error))
        self.add("problem", name, what, way_out or fix)

    def guard(self, name: str, fix: str = "", level: Level = "problem") -> Guard:
        """Return a context manager that turns exceptions and MoLS warnings into findings."""
        return Guard(self, name, fix, level)

    def count(self, level: Level) -> int:
        """Count the findings of one level."""
        return sum(item.level == level for item in self.items)

    def status(self, *, strict: bool) -> int:
        """Return the exit status: 1 with a problem (with `strict`, also with a warning), else 0."""
        return int(self.count("problem") > 0 or (strict and self.count("warning") > 0))

    def as_json(self, *, strict: bool) -> str:
        """Return `{"schema": 1, "status", "counts": {level: n}, "findings": [{"level", "name", "found", "fix"}]}`."""
        content = {
            "schema": SCHEMA,
            "status": self.status(strict=strict),
            "counts": {level: self.count(level) for level in LEVELS},
            "findings": [asdict(item) for item in self.items],
        }
        return json.dumps(content, indent=2)

    def as_text(self, *, width: int | None = None) -> str:
        """Return a table (by rich; plain lines if rich fails) and a last line with the counts."""
        counts = ", ".join(f"{self.count(level)} {level}" for level in LEVELS)
        try:
            body = self._table(width)
        except Exception:  # a broken rich may raise anything; print the findings anyway
            body = "\n".join(self._plain())
        return f"{body.rstrip()}\n{counts}"

    def _table(self, width: int | None) -> str:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(show_lines=False, pad_edge=False, box=None)
        for column in ("", "name", "found, and what to do"):
            table.add_column(column, overflow="fold")
        for item in self.items:
            words = Text(item.found)
            if item.fix:
                words.append(f"\n-> {item.fix}", style="bold")
            table.add_row(Text(item.level, style=COLORS[item.level]), item.name, words)
        if width is None and not sys.stdout.isatty():
            width = 120
        console = Console(width=width, highlight=False)
        with console.capture() as captured:
            console.print(table)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def _plain(self) -> Iterator[str]:
        for item in self.items:
            yield f"{item.level:<8} {item.name}: {item.found}"
            if item.fix:
                yield from textwrap.wrap(f"-> {item.fix}", 110, initial_indent=" " * 9, subsequent_indent=" " * 12)


class Guard:
    """Catch every exception except KeyboardInterrupt: a broken package may raise anything, even `SystemExit`."""

    def __init__(self, findings: Findings, name: str, fix: str, level: Level) -> None:
        self.findings, self.name, self.fix, self.level = findings, name, fix, level
        self._warnings = warnings.catch_warnings(record=True)
        self._seen: list[warnings.WarningMessage] = []

    def __enter__(self) -> None:
        self._seen = self._warnings.__enter__() or []
        warnings.simplefilter("always")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        self._warnings.__exit__(None, None, None)
        for warning in self._seen:
            if warning.category.__name__ == "MolsWarning":
                self.findings.add("warning", self.name, *split_way_out(str(warning.message)))
        if error is None or isinstance(error, KeyboardInterrupt):
            return False
        if isinstance(error, MolsError):
            self.findings.refused(self.name, error, self.fix)
        else:
            way_out = self.fix or "see the error; reinstall the package that it names"
            self.findings.add(self.level, self.name, f"cannot be checked: {last_line(error)}", way_out)
        return True


def split_way_out(text: str) -> tuple[str, str]:
    """Split a message of this package into (what is wrong, fix). The fix follows "; ", or in a refusal the last ": "
    that does not follow a quoted key. Return (message, "") if there is no fix."""
    text = " ".join(text.split())
    if text.count("; ") > 1:  # several mistakes in one line
        return text, ""
    what, semicolon, way_out = text.rpartition("; ")
    if semicolon:
        return what, way_out
    places = list(re.finditer(r"(?<![\"'\]}]): (?=\D)", text))
    if places and text.startswith(("MoLS does not support", "optimizer ", "megatron-core ")):
        return text[: places[-1].start()], text[places[-1].end() :]
    return text, ""


def last_line(error: BaseException) -> str:
    """Format an exception as one line: type and last line of its message, where packages say what is missing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Suppress output and logs of packages during a check: stdout is for the findings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
