"""Tiers: the highest label counts, a table launches what the chosen tests read, a label without a case is an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers import tiers
from tests.helpers.tiers import Cases, choose, note, tier_of


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose tests have not been chosen yet."""
    monkeypatch.setattr(Cases, "_selected", False)


def item(*marks: pytest.MarkDecorator) -> Any:
    """A test with these marks, the nearest first."""

    def iter_markers(name: str) -> Iterator[pytest.Mark]:
        return (mark.mark for mark in marks if mark.mark.name == name)

    return SimpleNamespace(iter_markers=iter_markers)


def table(**more: Any) -> Cases[str]:
    return Cases("abcd", quick="a", full="d", **more)


def test_the_highest_label_counts() -> None:
    labels = {
        "quick": [],
        "all": [pytest.mark.tier("all"), table().reads("a")],
        "full": [pytest.mark.tier("all"), table().reads("a", "d")],
    }
    for expected, marks in labels.items():
        assert tier_of(item(*marks)) == tier_of(item(*reversed(marks))) == expected


def test_rest_is_all_without_quick_and_full_is_everything() -> None:
    items = [item(), item(pytest.mark.tier("all")), item(pytest.mark.tier("full"))]
    taken = {choice: choose(items, choice)[0] for choice in tiers.CHOICES}
    assert taken["quick"] + taken["rest"] == taken["all"] and taken["full"] == items
    assert all(len(kept) + len(left) == 3 for kept, left in (choose(items, choice) for choice in tiers.CHOICES))


def test_a_file_with_a_test_in_full_is_in_the_readme(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("`known.py` and other.py", "utf-8")
    items = []
    for name, tier in (("known.py", "full"), ("other.py", "full"), ("third.py", "all")):
        items.append(item(pytest.mark.tier(tier)))
        items[-1].path = tmp_path / name
    assert tiers.undocumented(items, tmp_path) == {"other.py"}


@pytest.mark.usefixtures("fresh")
def test_only_what_is_read_is_launched_and_what_that_needs() -> None:
    cases = table(needs=lambda case: {"b": "c", "c": "d"}.get(case, ""))
    assert cases.wanted == list("abcd"), "on a rank, say, nothing was chosen"
    note([item()])
    assert cases.wanted == []
    note([item(cases.reads("b"))])
    assert cases.wanted == list("bcd")


def test_parameters_have_the_case_and_its_name() -> None:
    cases = Cases([("x", 1), ("y", 2)])
    spread = cases.parametrize(("name", "number"), ids=lambda case: case[0]).mark.args[1]
    assert [(row.values, row.id) for row in spread] == [(("x", 1), "x"), (("y", 2), "y")]
    whole = cases.parametrize("case", [7], reads=lambda value: [("x", 1)]).mark.args[1]
    assert whole[0].values == (7,) and whole[0].marks[0].mark.args == (cases, (("x", 1),))


def test_wrong_labels_are_errors() -> None:
    with pytest.raises(ValueError, match="no such cases: \\['e'\\]"):
        Cases("abcd", quick=["e"])
    with pytest.raises(ValueError, match="b: in two tiers"):
        Cases("abcd", quick=["b"], full=lambda case: case == "b")
    with pytest.raises(ValueError, match="twice"):
        Cases("abca")
    with pytest.raises(KeyError):
        table().reads("e")
