"""The table of docs/clients.md: every client at ZeRO-2 and 3 on one and two ranks, with what was seen to hold.

    make clients-table       # python -m tests.integrations.table: runs all of it and writes it into the page

A cell is "yes" where its check (places.py) passed on every rank, and "no" elsewhere.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from itertools import product
from pathlib import Path

from tests.helpers.harness import RankError
from tests.integrations.clients import CLIENTS, LAUNCHERS, launched
from tests.integrations.places import COLUMNS, PARTS, Seen, check, part_of
from tests.integrations.runner import Case, results, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clients.md"
BEGIN, END = "<!-- table: make clients-table -->", "<!-- end of the table -->"
STAGES, WORLDS = (2, 3), (1, 2)
Place = tuple[str, int, int]
"""(client, stage, ranks)."""
Cell = tuple[str, int, int, str]
"""(client, stage, ranks, part)."""
PLACES: list[Place] = list(product(CLIENTS, STAGES, WORLDS))
CELLS: list[Cell] = [(*place, part) for place in PLACES for part in PARTS]
BESIDES: list[Place] = [("Trainer", 0, 1), ("Accelerate", 0, 2)]
"""Places that are tested and not in the page's table."""


def in_all(cell: Cell) -> bool:
    """Whether `make test-all` runs it: two places of each client, and its parts spread over them, so that every pair of
    client, stage, ranks and part is there once."""
    client, stage, world, part = cell
    if stage == 0:
        return part == "counts"
    number = CLIENTS.index(client)
    first = (2, 1 + number % 2)
    second = (3, 2 - number % 2)
    turn = (PARTS.index(part) + number // 2) % 2
    return (stage, world) == (second if turn else first)


def case_of(cell: Cell) -> Case:
    """The launch that makes its runs."""
    client, stage, world, part = cell
    return (world, "launched" if client in LAUNCHERS else "clients:at_place", client, stage, part)


CASES = table(
    [*map(case_of, CELLS), *(case_of((*place, part)) for place in BESIDES for part in PARTS)],
    full=lambda case: not in_all((case[2], case[3], case[0], case[4])),
)


@functools.cache
def by_launcher(client: str, world: int, stage: int) -> dict[str, list[Seen]]:
    """The wanted parts of a place of a launcher, which is one launch."""
    parts = [c[4] for c in CASES.wanted if c[:4] == (world, "launched", client, stage)]
    with tempfile.TemporaryDirectory(prefix="launched_") as folder:
        ranks = launched(client, world, stage, parts, Path(folder))
    return {part: [seen[part] for seen in ranks] for part in parts}


def check_cell(client: str, stage: int, world: int, column: str) -> None:
    """Raises AssertionError where the cell does not hold."""
    part = part_of(column)
    if client in LAUNCHERS:
        check(column, by_launcher(client, world, stage)[part])
    else:
        check(column, results(world)[case_of((client, stage, world, part))[1:]])


# ---------------------------------------------------------------------- the page

HEAD = {
    "attached": "attached",
    "counts": "counts",
    "schedule": "schedule",
    "logs": "logs",
    "waiting": "resumed: waiting",
    "due": "due",
    "window": "in the window",
    "ramp": "ramp",
    "fixed": "fixed",
}


def rendered(failed: set[Cell]) -> str:
    """The table. `failed`: (client, stage, ranks, column) of the cells that do not hold."""
    lines = [
        f"| client | ZeRO | ranks | {' | '.join(HEAD[column] for column in COLUMNS)} |",
        f"|---|---|---|{'---|' * len(COLUMNS)}",
    ]
    for place in PLACES:
        values = ["no" if (*place, column) in failed else "yes" for column in COLUMNS]
        lines.append(f"| {' | '.join([*map(str, place), *values])} |")
    return "\n".join(lines)


def in_page(text: str, made: str) -> str:
    """The page with this table."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Run every cell and write the table. Status 1 where one does not hold."""
    failed: set[Cell] = set()
    for place, column in product(PLACES, COLUMNS):
        try:
            check_cell(*place, column)
        except (AssertionError, RankError) as error:
            failed.add((*place, column))
            print(*place, column, error, sep=": ", file=sys.stderr)
    PAGE.write_text(in_page(PAGE.read_text("utf-8"), rendered(failed)), "utf-8")
    print(f"{PAGE}: {len(PLACES) * len(COLUMNS) - len(failed)} yes, {len(failed)} no")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
