"""Simulate every rank of a large world on one machine: is each element counted once, and are the shards even?

    python -m mols_ds.plan.simulate --all                                # docs/evidence/simulated_ranks.md
    python -m mols_ds.plan.simulate configs/models/llama_7b.json --stage 3 --ranks 48
    python -m mols_ds.plan.simulate configs/megatron/llama_7b_tp2_pp2.yaml --ranks 64
    mols-ds plan ... --simulate                                               # the plan's own model, config and ranks

Each row runs in a separate process, which gives its own time and peak memory: `zero_world` or
`megatron_world` build the engine's optimizer on the meta device and give the ranges of each rank, `count` checks them.
Exit status: 0 if all rows pass, 1 if one fails, 2 for a user's mistake.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from mols_ds.apps.plan.command import YAML
from mols_ds.core.json_types import JsonObject
from mols_ds.core.validation import Frozen, validation_message
from mols_ds.errors import MolsConfigError, MolsError, printable
from mols_ds.training.cli_utils import FAILED, USER_MISTAKE, Parser, integer, run_program

PROGRAM = "simulate"
EVEN = 1.01
"""The most that a rank may own over the mean of its pipeline stage: what padding and replicated norms may add."""
SUMMED = 32_000_000
"""Elements of a rank up to which `GroupSums` itself is run over its ranges, a few seconds; above, the layouts' counts
alone are compared."""
SECONDS = 600.0
RANKS = (8, 64, 512, 4096)
MARK = "simulated: "


class SimulatedJob(Frozen):
    """One row. source: a model file for a ZeRO `stage`, or a Megatron config; options: `zero_world.OPTIONS`."""

    source: str
    ranks: int
    stage: int | None = None
    options: JsonObject = Field(default_factory=dict)
    changes: tuple[str, ...] = ()

    @property
    def engine(self) -> str:
        return "Megatron" if self.stage is None else f"ZeRO-{self.stage}"


class Result(Frozen):
    """What a row found. `summed`: of the last rank, by GroupSums itself ("" where it has too many elements)."""

    job: SimulatedJob
    elements: int
    pieces: int
    least: int
    mean: float
    most: int
    balance: float
    faults: tuple[str, ...]
    same_when_built: bool
    summed: bool | None
    seconds: float = 0.0
    peak_gib: float = 0.0

    @property
    def holds(self) -> bool:
        return not self.faults and self.balance <= EVEN and self.same_when_built and self.summed is not False


def table_jobs(configs: Path) -> list[SimulatedJob]:
    """The rows of `--all`; `configs`: the project's folder of that name."""
    models = [str(configs / "models" / f"{name}.json") for name in ("llama_7b", "llama_70b")]
    jobs = [SimulatedJob(source=m, ranks=n, stage=s) for m in models for s in (1, 2, 3) for n in RANKS]
    grids = [("llama_7b_tp2_pp2", (8, 64, 512, 4096)), ("llama_70b_tp8_pp8", (64, 512, 4096))]
    grids += [("mixtral_8x7b_tp2_pp4_ep8", (64, 512))]
    return jobs + [
        SimulatedJob(source=str(configs / "megatron" / f"{n}.yaml"), ranks=r) for n, many in grids for r in many
    ]


# ------------------------------------------------------------------ one row, in this process


def walk(job: SimulatedJob) -> Result:
    """Walk all ranks of a job. Alters no state that outlives it, but needs a process outside any process group.

    Raises MolsConfigError for a model or config that cannot be read, MolsUnsupportedError for what is not simulated.
    """
    from tests.tools.simulate.count import Count, Tally
    from tests.tools.simulate.zero_world import first_difference

    last = job.ranks - 1
    if job.stage is None:
        from mols_ds.training.megatron_settings import read
        from tests.tools.simulate.megatron_world import MegatronWorld

        world = MegatronWorld(read(job.source, job.changes), job.ranks)
        table, owned = world.run()
        count = Count(table)
        for rank in owned:
            count.add(*rank)
        ranges, built = owned[last].ranges, world.built(last)
    else:
        from tests.tools.simulate.zero_world import ZeroWorld, build_model

        zero = ZeroWorld(functools.partial(build_model, job.source), job.stage, job.ranks, job.options)
        count = Count(zero.table)
        for ranges in zero.ranges():
            count.add(ranges)
        built = zero.built(last)
    tally: Tally = count.finish()
    small = sum(item.numel for item in ranges) <= SUMMED
    return Result(
        job=job,
        elements=tally.elements,
        pieces=tally.pieces,
        least=tally.least,
        mean=tally.mean,
        most=tally.most,
        balance=tally.balance,
        faults=tally.faults,
        same_when_built=not first_difference(ranges, built),
        summed=count.sum_of(ranges) == count.expected_sum(ranges) if small else None,
    )


def _child(texts: Sequence[str]) -> int:
    """Entry of a process: for each job a line of JSON, with its seconds (imports included) and the peak of the
    process's resident memory so far."""
    for text in texts:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = walk(_job_from(text))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)
        spent = time.perf_counter() - start
        row = result.model_copy(update={"seconds": spent, "peak_gib": peak}).model_dump_json()
        print(f"\n{MARK}{row}", flush=True)
    return 0


def _job_from(text: str) -> SimulatedJob:
    try:
        return SimulatedJob.model_validate_json(text)
    except ValidationError as error:
        raise MolsConfigError(f"--one: {validation_message(error, SimulatedJob)}") from None


# ------------------------------------------------------------------ rows in separate processes


def simulate(job: SimulatedJob, *more: SimulatedJob, seconds: float = SECONDS) -> list[Result]:
    """Walk jobs one after the other in a process apart, for at most `seconds`.

    Raises MolsConfigError for what the user can mend, MolsError where the process ends otherwise or takes too long.
    """
    for one in (job, *more):
        if not Path(one.source).exists():
            raise MolsConfigError(f"{one.source}: no such model file, checkpoint folder or Megatron config")
    command = [sys.executable, "-P", "-m", "tests.tools.simulate.command"]
    command += [part for one in (job, *more) for part in ("--one", one.model_dump_json())]
    single = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    roots = [str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")]
    single["PYTHONPATH"] = os.pathsep.join(filter(None, roots))
    try:
        done = subprocess.run(command, env=os.environ | single, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise MolsError(f"{job.engine} on {job.ranks} ranks was not walked within {seconds:.0f} seconds") from None
    if done.returncode == USER_MISTAKE:
        raise MolsConfigError(done.stderr.strip().splitlines()[-1].removeprefix(f"{PROGRAM}: "))
    if done.returncode != 0:
        last = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise MolsError(f"{job.engine} on {job.ranks} ranks could not be walked: {last}")
    lines = done.stdout.splitlines()
    return [Result.model_validate_json(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]


def render(results: Sequence[Result]) -> str:
    """The rows as a table of about 120 columns, with the failures below it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("model", "engine"):
        table.add_column(title)
    for title in ("ranks", "pieces", "least", "mean", "most", "balance", "once", "seconds", "GiB"):
        table.add_column(title, justify="right")
    for result in results:
        job = result.job
        table.add_row(
            Path(job.source).stem,
            job.engine,
            f"{job.ranks:,}",
            f"{result.pieces:,}",
            f"{result.least:,}",
            f"{result.mean:,.0f}",
            f"{result.most:,}",
            f"{result.balance:.4f}",
            "yes" if not result.faults else "NO",
            f"{result.seconds:.1f}",
            f"{result.peak_gib:.2f}",
        )
    console = Console(width=128, file=io.StringIO(), record=True)
    console.print(table)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    return "\n".join([*lines, *_problems(results)])


def _problems(results: Iterable[Result]) -> list[str]:
    lines = []
    for result in results:
        what = [*result.faults]
        if result.balance > EVEN:
            what.append(f"a rank owns {result.balance:.3f} of its stage's mean, more than {EVEN}")
        if not result.same_when_built:
            what.append(f"rank {result.job.ranks - 1}, built whole, owns other pieces than the walk gave it")
        if result.summed is False:
            what.append("GroupSums counted other elements than the layouts say")
        lines += [f"{Path(result.job.source).stem}, {result.job.engine}, {result.job.ranks:,} ranks: {w}" for w in what]
    return lines


def checked_table(job: SimulatedJob) -> str:
    """The table of one job.

    Raises MolsConfigError as `simulate`, MolsError where an element is not counted once or the shards are uneven.
    """
    (result,) = simulate(job)
    if not result.holds:
        raise MolsError("; ".join(_problems([result])))
    return render([result])


def zero_job(model: str | None, config: str, ranks: int) -> SimulatedJob:
    """The job of a model file under the ZeRO stage and the `OPTIONS` of a DeepSpeed config. Raises MolsConfigError."""
    from mols_ds.optim.build import section_of, zero_stage
    from mols_ds.training.ds_config import AUTO, read_config
    from tests.tools.simulate.zero_world import OPTIONS

    if model is None:
        raise MolsConfigError("a DeepSpeed config does not hold the model: name a model file")
    content = read_config(config)
    zero = section_of(content, "zero_optimization")
    options = {key: zero[key] for key in OPTIONS if zero.get(key, AUTO) != AUTO}
    return SimulatedJob(source=model, ranks=ranks, stage=zero_stage(content), options=options)


# ------------------------------------------------------------------ the command


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m mols_ds.plan.simulate", description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", help="model file (with --stage or --config) or Megatron config")
    parser.add_argument("--ranks", type=integer(1), default=8, metavar="N", help="(default %(default)s)")
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), help="ZeRO stage, for a model file")
    parser.add_argument("--config", metavar="FILE", help="DeepSpeed config: its stage and how it cuts")
    parser.add_argument("--all", action="store_true", help="the whole table")
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="folder of the table's configs")
    parser.add_argument("--one", action="append", metavar="JSON", help=argparse.SUPPRESS)
    return parser


def _jobs(args: argparse.Namespace) -> list[SimulatedJob]:
    if args.all:
        return table_jobs(args.configs)
    if args.source is None or args.ranks < 1:
        raise MolsConfigError("name a model file or a Megatron config and --ranks of at least 1, or --all")
    if Path(args.source).suffix.lower() in YAML:
        return [SimulatedJob(source=args.source, ranks=args.ranks)]
    if args.config is not None:
        return [zero_job(args.source, args.config, args.ranks)]
    return [SimulatedJob(source=args.source, ranks=args.ranks, stage=3 if args.stage is None else args.stage)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its status: 1 if a row fails, 2 for a user's mistake."""
    return run_program(PROGRAM, lambda: _run(_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    if args.one:
        return _child(args.one)
    results = []
    for job in _jobs(args):
        results += simulate(job)
        print(f"{printable(Path(job.source).stem)}, {job.engine}, {job.ranks:,} ranks", file=sys.stderr)
    print(render(results))
    return 0 if all(result.holds for result in results) else FAILED


if __name__ == "__main__":
    sys.exit(main())
