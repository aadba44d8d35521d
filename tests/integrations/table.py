"""The table of docs/clients.md: every client at ZeRO-2 and 3 on one and two ranks, and those that work without
DeepSpeed, with what was seen to hold.

    make clients-table       # python -m tests.integrations.table: runs all of it and writes it into the page
    make clients-table ARGS="Lightning"    # some clients by name; the other rows stay as they are

A cell is "yes" where its check (places.py) passed on every rank, and "no" elsewhere.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from tests.helpers.harness import RankError
from tests.integrations.clients import CLIENTS, LAUNCHERS, SHARDED, WITHOUT_DEEPSPEED, launched
from tests.integrations.places import COLUMNS, PARTS, Seen, check, part_of
from tests.integrations.runner import Case, results, table
from tests.integrations.runs import PLAIN

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clients.md"
BEGIN, END = "<!-- table: make clients-table -->", "<!-- end of the table -->"
STAGES, WORLDS = (2, 3), (1, 2)
Place = tuple[str, int, int]
"""(client, stage, ranks)."""
Cell = tuple[str, int, int, str]
"""(client, stage, ranks, part)."""
PLACES: list[Place] = list(product(CLIENTS, STAGES, WORLDS))
PLACES += [(client, PLAIN, world) for client, worlds in WITHOUT_DEEPSPEED.items() for world in worlds]
KNOWN = {place[0] for place in PLACES}
CELLS: list[Cell] = [(*place, part) for place in PLACES for part in PARTS]
BESIDES: list[Place] = [("Trainer", 0, 1), ("Accelerate", 0, 2)]
"""Places that are tested and not in the page's table."""


PLAIN_IN_ALL = {
    "counts": [("Trainer", 2), ("Accelerate", 2), ("Lightning", 1), (SHARDED, 2)],
    "waiting": [("Lightning", 2)],
    "due": [("Accelerate", 1)],
    "window": [("Trainer", 2), (SHARDED, 2)],
    "ramp": [("Lightning", 1)],
    "fixed": [("Trainer", 1)],
}
"""Without DeepSpeed: part -> places of `make test-all`."""
TURNS = ("waiting", "due", "ramp", "fixed")
"""`make test-all` runs one of these parts for each client: the saved state does not depend on the client."""
COUNTS_ONLY = "SFTTrainer, LoRA"
"""SFTTrainer and the LoRA variant of DPOTrainer have the other parts."""


def in_all(cell: Cell) -> bool:
    """Whether `make test-all` runs it: each client at two places, with the runs that count, a checkpoint in the window
    and one of TURNS, so that every pair of client, stage and ranks, and of stage or ranks and part is there."""
    client, stage, world, part = cell
    if stage == 0:
        return part == "counts"
    if stage == PLAIN:
        return (client, world) in PLAIN_IN_ALL[part]
    number = CLIENTS.index(client)
    first, second = (2, 1 + number % 2), (3, 2 - number % 2)
    if part in TURNS:
        chosen = TURNS[number % 4] == part and (stage, world) == (second if number // 4 % 2 else first)
    else:
        turn = (number // 2 + (part == "window")) % 2
        chosen = (stage, world) == (second if turn else first)
    return chosen and (client != COUNTS_ONLY or part == "counts")


def case_of(cell: Cell) -> Case:
    """The launch that makes its runs."""
    client, stage, world, part = cell
    return (world, "launched" if client in LAUNCHERS else "clients:at_place", client, stage, part)


CASES = table(
    [*map(case_of, CELLS), *(case_of((*place, part)) for place in BESIDES for part in PARTS)],
    full=lambda case: not in_all((case[2], case[3], case[0], case[4])),
)


@functools.cache
def by_launcher(client: str, world: int, stage: int) -> dict[str, list[Seen]] | AssertionError:
    """The wanted parts of a place of a launcher, which is one launch; its error where it failed."""
    parts = [c[4] for c in CASES.wanted if c[:4] == (world, "launched", client, stage)]
    with tempfile.TemporaryDirectory(prefix="launched_") as folder:
        try:
            ranks = launched(client, world, stage, parts, Path(folder))
        except AssertionError as error:
            return error
    return {part: [seen[part] for seen in ranks] for part in parts}


def check_cell(client: str, stage: int, world: int, column: str) -> None:
    """Raises AssertionError where the cell does not hold."""
    part = part_of(column)
    if client in LAUNCHERS:
        if isinstance(seen := by_launcher(client, world, stage), AssertionError):
            raise seen
        check(column, seen[part])
        return
    ranks = results(world)[case_of((client, stage, world, part))[1:]]
    check(column, ranks)
    if stage == PLAIN and column == "attached":
        kind = "DTensor" if client == SHARDED else "DistributedDataParallel" if world > 1 else "LlamaForCausalLM"
        kind = "Module" if client == "Lightning" and world == 1 else kind
        for seen in ranks:
            assert kind in seen["real"]["kinds"] and kind in seen["stock"]["kinds"]


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
        client, stage, world = place
        lines.append(f"| {' | '.join([client, 'none' if stage == PLAIN else str(stage), str(world), *values])} |")
    return "\n".join(lines)


def read(page: str) -> set[Cell]:
    """The cells of a page's table that are "no"."""
    lines = page.split(BEGIN)[1].split(END)[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    stages = {"none": PLAIN, "2": 2, "3": 3}
    values = {(row[0], stages[row[1]], int(row[2])): row[3:] for row in rows if row[1:2] and row[1] in stages}
    return {(*place, c) for place, row in values.items() for c, cell in zip(COLUMNS, row, strict=True) if cell != "yes"}


def in_page(text: str, made: str) -> str:
    """The page with this table."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def main(clients: Sequence[str]) -> int:
    """Run every cell of these clients (default: of all) and write the table. Status 1 where one does not hold."""
    if unknown := set(clients) - KNOWN:
        sys.exit(f"no such client: {', '.join(sorted(unknown))}; clients: {', '.join(sorted(KNOWN))}")
    text = PAGE.read_text("utf-8")
    places = [place for place in PLACES if place[0] in (clients or KNOWN)]
    CASES.every = tuple(case for case in CASES if case[2] in (clients or KNOWN))
    failed = {cell for cell in read(text) if cell[:3] not in places}
    for place in places:
        wrong = {(*place, column): error for column in COLUMNS if (error := error_of(*place, column))}
        failed |= set(wrong)
        print(*place, "no" if wrong else "yes", sep=": ", flush=True)
        for cell, error in wrong.items():
            print(*cell, error, sep=": ", file=sys.stderr)
    PAGE.write_text(in_page(text, rendered(failed)), "utf-8")
    print(f"{PAGE}: {len(PLACES) * len(COLUMNS) - len(failed)} yes, {len(failed)} no")
    return int(bool(failed))


def error_of(client: str, stage: int, world: int, column: str) -> Exception | None:
    """Return what is wrong in a cell."""
    try:
        check_cell(client, stage, world, column)
    except (AssertionError, RankError) as error:
        return error
    return None


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
