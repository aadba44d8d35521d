"""Select the tests of a run and the cases to launch for them. tests/README.md describes the tiers.

A test without a label is in the tier "quick". `pytest.mark.tier("all")` or `("full")` on a test, a parameter or a
module moves it; of several labels the highest counts.

Where one launch of ranks works through a table of cases, the table is a `Cases`, and its cases have the labels. A test
says which cases it reads (`parametrize`, `reads`), has the highest tier among them, and is the reason why they are
launched: what no selected test reads is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest

T = TypeVar("T")

TIERS = ("quick", "all", "full")
CHOICES = {
    "quick": frozenset({"quick"}),
    "rest": frozenset({"all"}),  # what "all" has beyond "quick": CI runs one after the other
    "all": frozenset({"quick", "all"}),
    "full": frozenset(TIERS),
    "exhaustive": frozenset({"full"}),  # what "full" has beyond "all"
}
"""What `--tier` takes -> the labels of the tests that run."""
Where = Collection[T] | Callable[[T], bool]
"""The cases of a tier: a list, or a function."""


class Cases(Generic[T]):
    """A table of cases, hashable and in order, for a launch of ranks (`tests.helpers.harness.run_cases`)."""

    _selected: bool = False  # whether pytest has chosen the tests of this process

    def __init__(
        self,
        cases: Iterable[T],
        *,
        quick: Where[T] = (),
        full: Where[T] = (),
        needs: Callable[[T], Iterable[T]] = lambda case: (),
    ) -> None:
        """Cases that neither `quick` nor `full` has are in the tier "all".

        Args:
            cases: the whole table; a mapping gives its keys.
            quick: the cases that `make test` runs.
            full: the cases that only `make test-full` runs.
            needs: other cases that a case is compared with, launched wherever it is.

        Raises:
            ValueError: a duplicate case, a case with two labels, or a label without a case.
        """
        self.every = tuple(cases)
        self._tiers = {case: self._label(case, quick, full) for case in self.every}
        self._needs, self._read = needs, set[T]()
        if len(self._tiers) < len(self.every):
            raise ValueError("a case is there twice")
        for name, where in (("quick", quick), ("full", full)):
            if not callable(where) and (unknown := [case for case in where if case not in self._tiers]):
                raise ValueError(f"{name}: no such cases: {unknown}")

    @staticmethod
    def _label(case: T, quick: Where[T], full: Where[T]) -> str:
        labels = [
            name
            for name, where in (("quick", quick), ("full", full))
            if (where(case) if callable(where) else case in where)
        ]
        if len(labels) > 1:
            raise ValueError(f"{case}: in two tiers, {labels}")
        return labels[0] if labels else "all"

    def tier(self, case: T) -> str:
        """The label of a case."""
        return self._tiers[case]

    def reads(self, *cases: T) -> pytest.MarkDecorator:
        """Marks a test that reads these cases."""
        for case in cases:
            self._tiers[case]
        return pytest.mark.reads(self, cases)

    def parametrize(
        self,
        names: str | Sequence[str],
        values: Iterable[Any] | None = None,
        *,
        reads: Callable[[Any], Iterable[T]] | None = None,
        ids: Callable[[Any], str] | None = None,
    ) -> pytest.MarkDecorator:
        """`pytest.mark.parametrize` with a test a case.

        Args:
            names: of the test's arguments; of several, a case is spread over them.
            values: what the arguments take (default: every case).
            reads: value -> the cases that its test reads (default: the value is the case).
            ids: value -> the test's name in brackets.
        """
        several = not isinstance(names, str)
        rows = []
        for value in self.every if values is None else values:
            mark = self.reads(*([value] if reads is None else reads(value)))
            name = {} if ids is None else {"id": ids(value)}
            rows.append(pytest.param(*(value if several else [value]), marks=mark, **name))
        return pytest.mark.parametrize(names, rows)

    @property
    def wanted(self) -> list[T]:
        """The cases that the selected tests read, and those that these need, in order; without pytest every case."""
        if not Cases._selected:
            return list(self.every)
        found: set[T] = set()
        new = set(self._read)
        while new:
            found |= new
            new = {other for case in new for other in self._needs(case)} - found
        return [case for case in self.every if case in found]

    def __iter__(self) -> Iterator[T]:
        return iter(self.every)


def tier_of(item: pytest.Item) -> str:
    """The highest of the labels of a test."""
    labels = ["quick", *(mark.args[0] for mark in item.iter_markers("tier"))]
    labels += [table.tier(case) for table, cases in _read_by(item) for case in cases]
    return max(labels, key=TIERS.index)


def _read_by(item: pytest.Item) -> list[tuple[Cases[Any], tuple[Any, ...]]]:
    return [mark.args for mark in item.iter_markers("reads")]


def choose(items: list[pytest.Item], choice: str) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """(the tests that `--tier` takes, the others)."""
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        (kept if tier_of(item) in CHOICES[choice] else left).append(item)
    return kept, left


def undocumented(items: Iterable[pytest.Item], folder: Path) -> set[str]:
    """Files below `folder` with a test in "full" that its README does not name."""
    text = (folder / "README.md").read_text("utf-8")
    files = {item.path.relative_to(folder).as_posix() for item in items if tier_of(item) == "full"}
    return {file for file in files if f"`{file}`" not in text}


SHARED = {
    "tests/integrations/": "integrations/runner.py",
    "tests/engines/megatron/test_statistics.py": "engines/megatron/cases.py",
    "tests/engines/megatron/test_weights.py": "engines/megatron/cases.py",
}
"""Tests of several files that read one table of launches -> where it is."""


def launch_of(nodeid: str) -> str:
    """What a test shares launches of ranks with: its file, or the table that several files read."""
    file = nodeid.partition("::")[0]
    return next((table for start, table in SHARED.items() if file.startswith(start)), file)


def note(items: Iterable[pytest.Item]) -> None:
    """Have the tables launch what these tests read."""
    Cases._selected = True
    for item in items:
        for table, cases in _read_by(item):
            table._read.update(cases)
