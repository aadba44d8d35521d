"""`python -m tests.faults`: every fault in every phase on every engine, and a table of what was survived."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.tools.faults.launching import quiet_environment

quiet_environment()

from rich.console import Console  # noqa: E402  (what follows may import torch, which reads the environment)
from rich.table import Table  # noqa: E402

from tests.tools.faults.engines import ENGINES  # noqa: E402
from tests.tools.faults.faults import FAULTS, PHASES  # noqa: E402
from tests.tools.faults.matrix import Case, Verdict, Workshop, clear, disk_refused  # noqa: E402

WIDTH = 100


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    add = parser.add_argument
    add("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    add("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    add("--phases", nargs="+", choices=list(PHASES), default=list(PHASES))
    add(
        "--results",
        type=Path,
        help="JSON lines of finished cases: added to, and what was survived there is not run again",
    )
    add("--seconds", type=float, help="begin no case after this time; with --results, another call goes on")
    add("--table", action="store_true", help="run nothing: print the table of --results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where every case that was asked for was survived, 1 where one was not, 3 where cases are left."""
    args = parse_arguments(argv)
    cases = [Case(engine, fault, phase) for fault in args.faults for engine in args.engines for phase in args.phases]
    done = read(args.results)
    if not args.table:
        left = [case for case in cases if case not in done or done[case].problems]
        run(left, done, args.results, args.seconds)
    done = {case: done[case] for case in cases if case in done}
    Console(width=WIDTH, highlight=False).print(table(done))
    for case, verdict in done.items():
        for problem in verdict.problems:
            print(f"{case.fault} {case.engine} {case.phase}: {problem}")
    skipped = {verdict.skipped for verdict in done.values() if verdict.skipped}
    print(f"{summary(done)}{''.join(f'; skipped: {why}' for why in skipped)}")
    if any(verdict.problems for verdict in done.values()):
        return 1
    return 3 if len(done) < len(cases) else 0


def run(cases: Sequence[Case], done: dict[Case, Verdict], results: Path | None, seconds: float | None) -> None:
    """Run the cases, each a line on stderr and in `results`."""
    folder = Path(tempfile.mkdtemp(prefix="faults_"))
    began, refused = time.monotonic(), disk_refused()
    try:
        workshop = Workshop(folder)
        for case in cases:
            if seconds is not None and time.monotonic() - began > seconds:
                break
            skip = refused if case.fault == "full" else ""
            verdict = Verdict([], 0, 0.0, None, "", skipped=skip) if skip else workshop.run(case)
            done[case] = verdict
            said = verdict.skipped or "; ".join(verdict.problems) or "survived"
            print(
                f"{case.fault} {case.engine} {case.phase}: {said} ({verdict.end or '-'}, {verdict.launches} launches, "
                f"{verdict.seconds:.1f} s)",
                file=sys.stderr,
                flush=True,
            )
            if results is not None:
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**asdict(case), "verdict": asdict(verdict)}) + "\n")
    finally:
        clear(folder)


def read(results: Path | None) -> dict[Case, Verdict]:
    """The cases of a results file; the last line of a case counts."""
    found = {}
    if results is not None and results.is_file():
        for line in map(json.loads, results.read_text("utf-8").splitlines()):
            found[Case(line["engine"], line["fault"], line["phase"])] = Verdict(**line["verdict"])
    return found


def table(done: dict[Case, Verdict]) -> Table:
    """Rows: fault x engine; columns: phases; cells: survived / injected."""
    result = Table("fault", "engine", *PHASES, "ranks ended after", box=None, pad_edge=False)
    for fault in FAULTS:
        for engine in ENGINES:
            row = {c.phase: verdict for c, verdict in done.items() if (c.fault, c.engine) == (fault, engine)}
            if not row:
                continue
            cells = [_cell(row.get(phase)) for phase in PHASES]
            ends = [v.after_fault for v in row.values() if v.after_fault is not None and v.launches > 1]
            result.add_row(fault, engine, *cells, f"{max(ends):.1f} s" if ends else "none ended")
    return result


def _cell(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    return "skipped" if verdict.skipped else f"{int(not verdict.problems)}/1"


def summary(done: dict[Case, Verdict]) -> str:
    """The last line of the table."""
    tried = [verdict for verdict in done.values() if not verdict.skipped]
    survived = sum(not verdict.problems for verdict in tried)
    seconds = sum(verdict.seconds for verdict in done.values())
    return f"{survived} of {len(tried)} faults survived, in {seconds / 60:.0f} min"


if __name__ == "__main__":
    sys.exit(main())
