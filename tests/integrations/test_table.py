"""The table of docs/clients.md, cell by cell: real clients on gloo, each against its own run without MoLS."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.integrations.clients import CLIENTS
from tests.integrations.places import COLUMNS, PARTS, part_of
from tests.integrations.runner import Case
from tests.integrations.runs import PLAIN
from tests.integrations.table import (
    BEGIN,
    BESIDES,
    CASES,
    CELLS,
    COUNTS_ONLY,
    END,
    PAGE,
    PLACES,
    STAGES,
    WORLDS,
    case_of,
    check_cell,
    in_all,
    in_page,
    read,
    rendered,
)

ROWS = [(*place, column) for place, column in product([*PLACES, *BESIDES], COLUMNS)]


def reads(row: tuple[str, int, int, str]) -> list[Case]:
    *place, column = row
    return [case_of((*place, part_of(column)))]  # type: ignore[arg-type]


@pytest.mark.distributed
@pytest.mark.timeout(3600)  # the first test of a number of ranks waits for the launch of all
@CASES.parametrize(("client", "stage", "world", "column"), ROWS, reads=reads)
def test_cell(client: str, stage: int, world: int, column: str) -> None:
    check_cell(client, stage, world, column)


def test_the_selection_has_every_pair_but_client_and_part() -> None:
    """`make test-all` has every two of client, stage, ranks and of stage, ranks, part, and each client's counts."""
    chosen = [cell for cell in CELLS if in_all(cell) and cell[1] != PLAIN]
    factors = (CLIENTS, STAGES, WORLDS, PARTS)
    for one, other in combinations(range(4), 2):
        missing = set(product(factors[one], factors[other])) - {(cell[one], cell[other]) for cell in chosen}
        if (one, other) == (0, 3):
            assert not {client for client, part in missing if part == "counts"}
        else:
            assert {pair for pair in missing if COUNTS_ONLY not in pair} == set()


def test_the_page_has_the_table() -> None:
    """Every cell of it is a test above, so that "yes" is what `make clients-table` writes where they pass."""
    text = PAGE.read_text("utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert in_page(text, rendered(set())) == text


def test_rows_that_are_not_run_stay_as_they_are() -> None:
    failed = {("Lightning", 3, 2, "ramp"), ("Trainer", 2, 1, "logs"), ("Trainer", PLAIN, 1, "due")}
    assert read(in_page(PAGE.read_text("utf-8"), rendered(failed))) == failed
