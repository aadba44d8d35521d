"""What the doctor found: findings as text, as JSON and as an exit status. Needs the standard library only, so that a
broken installation can be reported by it."""

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
    """One thing that was looked at.

    Attributes:
        level: ok; note (worth knowing, nothing to do); warning (runs, likely not as meant); problem (will not run).
        name: dotted and stable, for scripts: "deepspeed.version", "config.schedule".
        found: what is there.
        fix: what to do about it; "" where there is nothing to do.
    """

    level: Level
    name: str
    found: str
    fix: str = ""


@dataclass
class Findings:
    """The findings in the order of the checks."""

    items: list[Finding] = field(default_factory=list)

    def add(self, level: Level, name: str, found: str, fix: str = "") -> None:
        """Add one finding; foreign text in it is made safe to print, on one line."""
        self.items.append(Finding(level, printable(name), printable(found), printable(fix)))

    def refused(self, name: str, error: MolsError, fix: str) -> None:
        """A problem from an error of this package, whose message ends with the way out; else `fix` is it."""
        what, way_out = split_way_out(str(error))
        self.add("problem", name, what, way_out or fix)

    def guard(self, name: str, fix: str = "", level: Level = "problem") -> Guard:
        """`with findings.guard(...)`: whatever the check raises becomes a finding, and each MoLS warning of it too."""
        return Guard(self, name, fix, level)

    def count(self, level: Level) -> int:
        """How many findings have this level."""
        return sum(item.level == level for item in self.items)

    def status(self, *, strict: bool) -> int:
        """Exit status: 1 with a problem, with `strict` also with a warning; else 0."""
        return int(self.count("problem") > 0 or (strict and self.count("warning") > 0))

    def as_json(self, *, strict: bool) -> str:
        """`{"schema": 1, "status", "counts": {level: n}, "findings": [{"level", "name", "found", "fix"}]}`."""
        content = {
            "schema": SCHEMA,
            "status": self.status(strict=strict),
            "counts": {level: self.count(level) for level in LEVELS},
            "findings": [asdict(item) for item in self.items],
        }
        return json.dumps(content, indent=2)

    def as_text(self, *, width: int | None = None) -> str:
        """A table by rich, or plain lines where rich cannot be used, and a last line with the counts."""
        counts = ", ".join(f"{self.count(level)} {level}" for level in LEVELS)
        try:
            body = self._table(width)
        except Exception:  # a broken rich raises anything, and what was found must still be said
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
    """Lets nothing out but the user's Ctrl-C: a broken package may raise anything, `SystemExit` too."""

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
    """(what is wrong, the way out) of a message of this package: after its "; ", or of a refusal after the last ": "
    that does not follow a quoted key. (the message, "") where there is none."""
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
    """An exception as one line: its type and the last line of its message, where packages say what is missing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Swallow what packages print and log while they are looked at: stdout belongs to the findings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
