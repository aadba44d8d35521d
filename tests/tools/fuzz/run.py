"""All targets, one after the other, and the table of what came of them."""

from __future__ import annotations

from collections.abc import Sequence

from tests.tools.fuzz import elements, files, states
from tests.tools.fuzz.common import ACCEPTED, REFUSED, Outcome, Target, fuzz

TARGETS: list[Target] = [*elements.TARGETS, *files.TARGETS, *states.TARGETS]


def run_all(examples: int | None = None, seed: int | None = None) -> list[Outcome]:
    """Every target with its own number of cases, or with its share of `examples`."""
    short = sum(target.examples for target in TARGETS)
    scale = 1.0 if examples is None else examples / short
    return [fuzz(target, max(1, round(target.examples * scale)), seed) for target in TARGETS]


def table(outcomes: Sequence[Outcome]) -> str:
    """One line a target and one with the sums."""
    rows = [("target", "cases", "refused", "accepted", "failures", "seconds")]
    for outcome in outcomes:
        counts = outcome.counts
        failures = int(bool(outcome.failure))
        rows.append(
            (
                outcome.name,
                f"{outcome.cases:,}",
                f"{counts[REFUSED]:,}",
                f"{counts[ACCEPTED]:,}",
                str(failures),
                f"{outcome.seconds:.1f}",
            )
        )
    sums = [sum(o.cases for o in outcomes), *(sum(o.counts[key] for o in outcomes) for key in (REFUSED, ACCEPTED))]
    failures = sum(bool(o.failure) for o in outcomes)
    seconds = sum(o.seconds for o in outcomes)
    rows.append(("together", *(f"{value:,}" for value in sums), str(failures), f"{seconds:.1f}"))
    width = max(len(row[0]) for row in rows)
    return "\n".join("  ".join([row[0].ljust(width), *(cell.rjust(8) for cell in row[1:])]) for row in rows)
