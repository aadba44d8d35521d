"""What MoLS costs as models, ranks and the number of parameters grow: CPU seconds, memory, counted operations.

    python benchmarks/scale.py                         # about ten minutes and 10 GiB: up to 1e9 owned elements
    python benchmarks/scale.py --quick                 # half a minute, for CI
    python benchmarks/scale.py --only engine --device cuda   # a real engine and the accumulator on an accelerator

Sections. `sizes`: a calibration of one rank that owns 1e6 to 1e9 elements. `ranks`: 1 to 8 gloo ranks, with so many
elements each, and with so many in all. `parameters`: the same elements in 10 to 10,000 parameters, with the optimizer
step after the calibration. `engine` (only when asked for): step time over stock DeepSpeed, peak memory, bandwidth.
The shards are synthetic; what takes them in is what engines use: local_stats.py,
accumulators.py, group_stats.py, lr_scaler.py and groups.py of mols_ds/core.

Seconds are CPU seconds of a process: eight ranks on two cores share those. The exit status is 1 where a bound on memory
or on a counted operation is broken, with --strict also one on time, and 2 for a mistake in the arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NoReturn

import psutil
import scale_parts
import torch
from rich.console import Console
from rich.table import Table

SECTIONS = ("sizes", "ranks", "parameters", "engine")
BYTES_PER_ELEMENT = 8  # two fp32 accumulators
TRANSIENT_BYTES, TRANSIENT_SHARE = 96 << 20, 0.05  # above the accumulators: chunks, and the group numbers being made
JOB_SECONDS = 1200.0
Row = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A bound and what was measured. `kind` "time" is binding with --strict only."""

    what: str
    value: float
    bound: float
    kind: Literal["memory", "count", "time"]

    @property
    def holds(self) -> bool:
        return self.value <= self.bound


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS[:3], help="sections (all but `engine`)")
    parser.add_argument("--quick", action="store_true", help="the short form: 1e6 and 1e7 elements, 2 ranks")
    parser.add_argument("--strict", action="store_true", help="a broken bound on time fails, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object in the place of the tables")
    parser.add_argument("--largest", type=float, default=1e9, help="owned elements of the largest shard (1e9)")
    parser.add_argument("--samples", type=int, default=8, help="gradient samples a calibration, at least 4 (8)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the section `engine` (cpu)")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the section `engine`'s LLaMA (1024)")
    parser.add_argument("--layers", type=int, default=24, help="layers of it (24: 368 M weights with the width 1024)")
    parser.add_argument("--rounds", type=int, default=30, help="counted steps of each of its arms (30)")
    args = parser.parse_args(argv)
    if args.samples < 4:
        parser.error("--samples: at least 4 are needed")
    if args.largest < 1e7:
        parser.error("--largest: at least 1e7, or there is nothing to compare")
    if "engine" in args.only and args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; use --device cpu")
    return args


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the line through the points in log-log: 1 is linear, 0 is flat."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(max(y, 1e-12)) for y in ys]).slope


def run_jobs(job: Callable[..., Row], arguments: Sequence[tuple[Any, ...]]) -> list[Row]:
    """Run `job` once for each tuple, all at the same time, each in a fresh process forked after torch's import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["mols_ds.core.local_stats", "mols_ds.core.lr_scaler", "mols_ds.core.estimators", "torch.distributed"]
    )
    with context.Pool(len(arguments), maxtasksperchild=1) as pool:
        return pool.starmap_async(job, arguments, chunksize=1).get(JOB_SECONDS)


# ---------------------------------------------------------------------- sections


def sizes(args: argparse.Namespace, say: Callable[[Any], None]) -> tuple[list[Row], list[Verdict]]:
    """Time and memory of one rank over the elements that it owns."""
    largest = 1e7 if args.quick else args.largest
    wanted = [int(10**power) for power in range(6, int(math.log10(largest)) + 1)]
    rows = []
    for elements in wanted:
        needed = (BYTES_PER_ELEMENT * (1 + TRANSIENT_SHARE) * elements) + (1 << 30)
        if psutil.virtual_memory().available < needed:
            say(f"[bold]skipped[/]: {elements:.0e} elements need {needed / 2**30:.1f} GiB of free memory")
            continue
        rows += run_jobs(scale_parts.size_job, [(elements, args.samples, elements <= (1e7 if args.quick else 1e8))])
    table = Table("owned elements", "sample, ns/element", "sums, ns/element", "calibration, CPU s", title="One rank")
    for heading in ("accumulators, bytes/element", "peak above them, MiB", "torch elements/element", "all-reduce, kB"):
        table.add_column(heading)
    for row in rows:
        n = row["elements"]
        above = row["peak_growth_bytes"] - row["accumulator_bytes"]
        table.add_row(
            f"{n:,}", f"{row['sample_s'] / n * 1e9:.2f}", f"{row['sums_s'] / n * 1e9:.1f}",
            f"{row['calibration_s']:.2f}", f"{row['accumulator_bytes'] / n:.4f}", f"{above / 2**20:.0f}",
            f"{row['touched'] / n:.1f}" if "touched" in row else "not counted", f"{row['message_bytes'] / 1e3:.0f}",
        )  # fmt: skip
    say(table)
    ns = [row["elements"] for row in rows]
    counted = [row for row in rows if "touched" in row]
    above = max(r["peak_growth_bytes"] - r["accumulator_bytes"] * (1 + TRANSIENT_SHARE) - TRANSIENT_BYTES for r in rows)
    messages = [row["message_bytes"] for row in rows]
    each = max(row["accumulator_bytes"] / row["elements"] for row in rows)
    touched = slope([row["elements"] for row in counted], [row["touched"] for row in counted])
    growth = slope(ns, [row["accumulator_bytes"] for row in rows])
    return rows, [
        Verdict("accumulators, bytes an element", each, 8.072, "memory"),
        Verdict("accumulator bytes over elements, slope", growth, 1.001, "memory"),
        Verdict("peak above 1.05 accumulators, MiB", above / 2**20, TRANSIENT_BYTES / 2**20, "memory"),
        Verdict("torch elements over elements, slope", touched, 1.02, "count"),
        Verdict("all-reduce: largest over smallest message", max(messages) / min(messages), 1.0, "count"),
        Verdict("CPU seconds over elements, slope", slope(ns, [r["calibration_s"] for r in rows]), 1.1, "time"),
    ]  # fmt: skip


def ranks(args: argparse.Namespace, say: Callable[[Any], None]) -> tuple[list[Row], list[Verdict]]:
    """Time and memory of each rank, elements a rank held equal ("each"), and elements in all held equal ("in all").

    A setting's time is the shortest of three launches, which other work on the machine lengthened least.
    """
    worlds, each, in_all = ((1, 2), 10**6, 2 * 10**6) if args.quick else ((1, 2, 4, 8), 10**7, 4 * 10**7)
    settings = [(held, world) for held in ("each", "in all") for world in worlds]
    taken: list[list[Row]] = [[] for _ in settings]
    for _ in range(1 if args.quick else 3):  # the repetitions of a setting lie apart: other work comes and goes
        for (held, world), results in zip(settings, taken, strict=True):
            total = each * world if held == "each" else in_all
            with tempfile.TemporaryDirectory(prefix="mols_scale_") as folder:
                jobs = [(rank, world, total, args.samples, f"{folder}/store") for rank in range(world)]
                results.append(_rank_row(held, run_jobs(scale_parts.rank_job, jobs)))
    rows = [min(results, key=lambda row: row["ns"]) for results in taken]
    table = Table("held equal", "ranks", "elements a rank", "CPU ns/owned element", "ratio to 1 rank", title="Ranks")
    for heading in ("CPU s a rank", "ratio x ranks", "MiB a rank", "all-reduces", "kB each"):
        table.add_column(heading)
    first = {row["held"]: row for row in reversed(rows)}
    for row in rows:
        one = first[row["held"]]
        row["ratio"] = row["ns"] / one["ns"]
        work = row["seconds"] / one["seconds"] * (row["ranks"] if row["held"] == "in all" else 1)
        table.add_row(
            row["held"], str(row["ranks"]), f"{row['elements']:,}", f"{row['ns']:.1f}", f"{row['ratio']:.2f}",
            f"{row['seconds']:.3f}", f"{work:.2f}", f"{row['bytes'] / 2**20:.1f}", str(row["all_reduces"]),
            f"{row['message_bytes'] / 1e3:.0f}",
        )  # fmt: skip
    say(table)
    strong = [row for row in rows if row["held"] == "in all"]
    spread = max(abs(r["alphas"][g] / strong[0]["alphas"][g] - 1.0) for r in strong for g in r["alphas"])
    messages = [row["message_bytes"] for row in rows]
    fullest = max(row["bytes"] * row["ranks"] for row in strong) / strong[0]["bytes"]
    return rows, [
        Verdict("elements not counted exactly once", max(r["miscounted"] for r in rows), 0.0, "count"),
        Verdict("ranks whose alphas have other bits", max(r["other_bits"] for r in rows), 0.0, "count"),
        Verdict("alphas over the number of ranks, relative", spread, 1e-9, "count"),
        Verdict("all-reduces a calibration", max(r["all_reduces"] for r in rows), 1.0, "count"),
        Verdict("all-reduce: largest over smallest message", max(messages) / min(messages), 1.0, "count"),
        Verdict("in all: bytes of the fullest rank x ranks over 1 rank's", fullest, 1.001, "memory"),
        Verdict("CPU seconds an owned element over 1 rank's, worst", max(r["ratio"] for r in rows), 1.25, "time"),
    ]  # fmt: skip


def _rank_row(held: str, results: list[Row]) -> Row:
    """One line out of what the ranks of a launch returned: the median rank's time, the fullest rank's memory."""
    owned = [result["elements"] for result in results]
    return {
        "held": held,
        "ranks": len(results),
        "elements": max(owned),
        "seconds": statistics.median(result["calibration_s"] for result in results),
        "ns": statistics.median(result["calibration_s"] / result["elements"] * 1e9 for result in results),
        "bytes": max(result["accumulator_bytes"] for result in results),
        "all_reduces": max(result["all_reduces"] for result in results),
        "message_bytes": max(result["message_bytes"] for result in results),
        "miscounted": abs(results[0]["total"] - sum(owned)) + abs(results[0]["total"] - results[0]["counted"]),
        "other_bits": sum(result["alphas"] != results[0]["alphas"] for result in results),
        "alphas": results[0]["alphas"],
    }


COSTS = (
    ("attach: rules, layouts, table", "build", 100.0),
    ("attach: plan of a flat shard", "plan", 10.0),
    ("sample, flat shard", "flat_sample", 1.0),
    ("sample, a tensor each", "apart_sample", 50.0),
    ("sums at the end", "sums", 500.0),
    ("step hooks, flat shard", "flat_hooks", 10.0),
    ("step hooks, a tensor each", "apart_hooks", 5.0),
)
"""What is measured, its key, and the bound in microseconds a parameter that --strict asks for."""


def parameters(args: argparse.Namespace, say: Callable[[Any], None]) -> tuple[list[Row], list[Verdict]]:
    """What the number of parameters adds, the elements held equal."""
    counts, elements = ((10, 100, 1000), 10**6) if args.quick else ((10, 100, 1000, 10000), 2 * 10**7)
    jobs = [(elements, count, args.samples, 2 if args.quick else 5) for count in counts]
    rows = [run_jobs(scale_parts.parameter_job, [job])[0] for job in jobs]
    names = [f"{row['parameters']:,}" for row in rows]
    table = Table(
        "CPU ms, parameters:", *names, "us/parameter", "calls/parameter", "slope of calls", title="Parameters"
    )
    verdicts, xs = [], [row["parameters"] for row in rows]
    for what, key, bound in COSTS:
        times, calls = [row[f"{key}_s"] for row in rows], [row[f"{key}_calls"] for row in rows]
        each = statistics.linear_regression(xs, times).slope * 1e6
        steep = slope(xs[-2:], calls[-2:])
        table.add_row(
            what, *(f"{t * 1e3:.2f}" for t in times), f"{each:.1f}",
            f"{(calls[-1] - calls[0]) / (xs[-1] - xs[0]):.1f}", f"{steep:.2f}",
        )  # fmt: skip
        verdicts.append(Verdict(f"{what}: calls over parameters, slope", steep, 1.05, "count"))
        verdicts.append(Verdict(f"{what}: us a parameter", each, bound, "time"))
    for what, key in (("AdamW step, flat shard", "flat"), ("AdamW step, a tensor each", "apart")):
        for arm in ("stock", "scaled"):
            times = [row[f"{key}_{arm}_step_s"] for row in rows]
            each = statistics.linear_regression(xs, times).slope * 1e6
            table.add_row(f"{what}: {arm}", *(f"{t * 1e3:.2f}" for t in times), f"{each:.1f}", "", "")
    table.add_row("runs of equal rate in the shard", *(f"{row['runs']:,}" for row in rows), "", "", "")
    say(table)
    flat = [row["flat_sample_calls"] for row in rows]
    return rows, [*verdicts, Verdict("sample, flat shard: most over fewest calls", max(flat) / min(flat), 1.0, "count")]


def engine(args: argparse.Namespace, say: Callable[[Any], None]) -> tuple[list[Row], list[Verdict]]:
    import scale_engine

    return scale_engine.section(args, say, Verdict)


RUN = {"sizes": sizes, "ranks": ranks, "parameters": parameters, "engine": engine}

# ---------------------------------------------------------------------- command


def show(verdicts: Sequence[Verdict], strict: bool) -> Table:
    table = Table("bound", "measured", "at most", "kind", "", title="Verdicts")
    for verdict in verdicts:
        binding = strict or verdict.kind != "time"
        mark = "[green]holds[/]" if verdict.holds else "[red]BROKEN[/]" if binding else "[yellow]above[/]"
        table.add_row(verdict.what, f"{verdict.value:.4g}", f"{verdict.bound:.4g}", verdict.kind, mark)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections, print tables or JSON. Returns the exit status."""
    args = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 150, quiet=args.json)
    measured: dict[str, list[Row]] = {}
    verdicts: list[Verdict] = []
    for name in args.only:
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):  # engines print tables of their own
            measured[name], found = RUN[name](args, console.print)
        verdicts += [Verdict(f"{name}: {v.what}", v.value, v.bound, v.kind) for v in found]
    console.print(show(verdicts, args.strict))
    if args.json:
        lines = [asdict(verdict) | {"holds": verdict.holds} for verdict in verdicts]
        print(json.dumps({"measured": measured, "verdicts": lines}))
    broken = [v for v in verdicts if not v.holds and (args.strict or v.kind != "time")]
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
