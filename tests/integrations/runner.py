"""One launch of ranks for the tests of all clients, since importing their libraries is what costs.

A case is (ranks, "MODULE:FUNCTION" of tests.integrations, further arguments); one without a colon is not launched here.
Each test file has a table of its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterable
from typing import Any

from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases, Where
from tests.integrations.runs import PLAIN, own_folder

Case = tuple[Any, ...]
_tables: list[Cases[Case]] = []


def table(cases: Iterable[Case], full: Where[Case] = (), quick: Where[Case] = ()) -> Cases[Case]:
    """A table whose cases are launched with those of the other files."""
    made: Cases[Case] = Cases(cases, quick=quick, full=full)
    _tables.append(made)
    return made


def one(name: str, *rest: Any) -> Any:
    """On a rank: one case, in a folder of its own."""
    module, _, function = name.partition(":")
    found: Any = getattr(importlib.import_module(f"tests.integrations.{module}"), function)
    with contextlib.chdir(own_folder(f"{module}_{function}_{'_'.join(map(str, rest))}")):
        return found(*rest)


@functools.cache
def results(world: int) -> Results:
    """Of every case that a selected test reads. Runs without DeepSpeed have a launch of their own: a client that has
    used DeepSpeed once in a process does not forget it (accelerate's state and environment)."""
    wanted = [case[1:] for cases in _tables for case in cases.wanted if case[0] == world and ":" in case[1]]
    found = Results()
    for plain in (False, True):
        part = run_cases(one, world, [case for case in wanted if _is_plain(case) == plain], timeout=300)
        found.values |= part.values
        found.failures |= part.failures
    return found


def _is_plain(case: tuple[Any, ...]) -> bool:
    return str(case[0]).startswith("test_plain:") or PLAIN in case[1:]
