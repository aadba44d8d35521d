"""`mols-ds compare STUDY.yaml`: run or continue a study and write its report.

On one machine, `--jobs` processes train one run each. If a run needs many ranks, a launcher starts all of them on the
same study; they train its runs one after the other:

    mols-ds compare studies/laptop.yaml --jobs 2
    torchrun --nproc_per_node 8 -m mols_ds.study studies/paper-1b.yaml
    deepspeed --hostfile hosts --module mols_ds.apps.study studies/paper-7b.yaml
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mols_ds.apps.study.runs import Store, StudyResults, StudyRun, collect, needed, setting_text
from mols_ds.apps.study.spec import Study, load_study
from mols_ds.core.files import write_whole
from mols_ds.core.json_types import JsonObject
from mols_ds.core.log import tell, versions
from mols_ds.errors import MolsConfigError
from mols_ds.training.cli_utils import FAILED, Parser, integer, run_program

if TYPE_CHECKING:
    from mols_ds.apps.study.workers import Failure, RunTask

MOST_JOBS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("study", metavar="STUDY.yaml", help="study file, such as studies/laptop.yaml")
    parser.add_argument("--out", type=Path, help="folder for results and report (default: runs/NAME of the study)")
    parser.add_argument("--jobs", type=integer(1), help=f"parallel runs here (default: cores, at most {MOST_JOBS})")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these arms, and the baseline")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="only these models")
    parser.add_argument("--seeds", nargs="+", type=integer(0), metavar="SEED", help="replace the evaluation seeds")
    parser.add_argument("--rerun", type=integer(1), metavar="N", help="repeat N random finished runs, compare bits")
    parser.add_argument("--report-only", action="store_true", help="train nothing, report the finished runs")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def compare(args: argparse.Namespace) -> int:
    """Run the command. Return 1 if a run failed, else 0. Raises MolsError for a user error."""
    study = load_study(args.study)
    if args.models:
        study = _only_models(study, args.models)
    if args.arms:
        study = _only(study, args.arms)
    if args.seeds:
        if len(set(args.seeds)) < len(args.seeds):
            raise MolsConfigError(f"--seeds {' '.join(map(str, args.seeds))}: each seed once")
        study = study.model_copy(update={"seeds": tuple(args.seeds)})
    out = args.out or Path("runs") / study.name
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if args.jobs is not None and launched:
        raise MolsConfigError("--jobs: not in a launched job, whose ranks train one run at a time")
    _can_report()
    _prepare(study, out)
    store = Store(study, out)
    command = f"mols-ds compare {args.study}" + ("" if args.out is None else f" --out {args.out}")
    failures: list[Failure] = []
    if args.rerun is not None and launched:
        raise MolsConfigError("--rerun: not in a launched job")
    if args.rerun is not None:
        from mols_ds.apps.study.rerun import rerun

        failures = rerun(study, store, args.rerun)
        for failure in failures:
            tell(f"mols-ds: {failure.run.label} was not repeated: {failure.why}", sys.stderr)
        return FAILED if failures else 0
    if not args.report_only:
        failures = _launched(study, store) if launched else _here(study, store, args.jobs or default_jobs())
    if int(os.environ.get("RANK", "0")) == 0:
        report(collect(study, store), out, command)
        for failure in failures:
            tell(f"mols-ds: {failure.run.label} failed: {failure.why}", sys.stderr)  # may be a traceback
    if launched and not args.report_only:
        import torch.distributed

        from mols_ds.training.ranks import leave_ranks

        torch.distributed.barrier()  # if one rank exits while another works, the launcher ends the job
        leave_ranks()
    return FAILED if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m mols_ds.study`: a launcher starts it on every rank."""
    parser = Parser(prog="mols_ds.apps.study", description=__doc__)
    add_arguments(parser)
    silent = int(os.environ.get("RANK", "0")) != 0  # rank 0 prints the same error
    return run_program("mols-ds", lambda: compare(parser.parse_args(argv)), silent=silent)


def default_jobs() -> int:
    """Return the default of --jobs: 1 on an accelerator; on the CPU one per core, at most MOST_JOBS."""
    from deepspeed.accelerator import get_accelerator

    return min(MOST_JOBS, os.cpu_count() or 1) if get_accelerator().device_name() == "cpu" else 1


def _only(study: Study, arms: Sequence[str]) -> Study:
    for arm in arms:
        if arm not in study.arms:
            raise MolsConfigError(f'--arms: "{arm}" is not one of {", ".join(study.arms)}')
    for model in study.models:
        if (change := study.changes.get(model)) is not None and change.best is not None:
            raise MolsConfigError(f"--arms: {model} trains the best of all arms; leave it out with --models")
    started = {search.start for name in arms if (search := study.arms[name].search) is not None}
    kept = {name: arm for name, arm in study.arms.items() if name in {*arms, *started, study.baseline}}
    return study.model_copy(update={"arms": kept})


def _only_models(study: Study, models: Sequence[str]) -> Study:
    for model in models:
        if model not in study.models:
            raise MolsConfigError(f'--models: "{model}" is not one of {", ".join(study.models)}')
    kept = {*models, *(study.changes[name].settings_of for name in models if name in study.changes)}
    return study.model_copy(update={"models": {name: study.models[name] for name in study.models if name in kept}})


def _can_report() -> None:
    """Import the packages of the report now, not after hours. Raises MolsConfigError if one is missing."""
    try:
        importlib.import_module("mols_ds.apps.study.report")
    except ModuleNotFoundError as error:
        name = {"markdown_it": "markdown-it-py"}.get(str(error.name), str(error.name).partition(".")[0])
        raise MolsConfigError(f"the report of a study needs {name}: pip install {name}") from error


def _prepare(study: Study, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if int(os.environ.get("RANK", "0")) == 0:
            facts = {"study": study.model_dump(mode="json"), "machine": machine(), "versions": versions(PACKAGES)}
            write_whole(out / "study.json", json.dumps(facts, indent=2) + "\n")
    except OSError as error:
        raise MolsConfigError(f"--out {out}: {error.strerror or error}") from error


PACKAGES = ("deepspeed", "transformers", "pytorch-optimizer", "bitsandbytes")


def machine() -> JsonObject:
    """Describe the machine of the runs, without its name."""
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    name = device = accelerator.device_name()
    if name != "cpu":
        device = torch.cuda.get_device_name(0) if name == "cuda" else name
        device = f"{accelerator.device_count()} x {device}"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return {"device": device, "cores": os.cpu_count(), "processor": platform.machine(), "ranks": world}


# ---------------------------------------------------------------------- training


class _Lines:
    """Print one line per finished run, with the number of known runs to come."""

    def __init__(self, study: Study, store: Store) -> None:
        self.study, self.store = study, store
        self.finished = 0
        self.began = time.monotonic()

    def __call__(self, task: RunTask, result: JsonObject) -> None:
        if task.baseline is not None:
            self.store.save_cost(task.run, result)
            ratio, memory = result["step_ratio"][0], result["memory_ratio"]
            tell(f"cost of {task.run.model} {task.run.arm}: step x {ratio:.3f}, memory x {memory:.3f}")
            return
        self.finished += 1
        loss = result["val_loss"]
        outcome = "diverged" if loss is None else f"{loss:.4f} (ppl {math.exp(loss):.2f})"
        alphas = " ".join(f"{g} {a:.3g}" for g, a in result["alphas"].items() if g != "other")
        left = len(needed(self.study, self.store)[0])
        minutes = (time.monotonic() - self.began) / 60
        tell(
            f"[{minutes:5.1f} min, {self.finished} done, {left} or more to come] {task.run.label:44s} "
            f"{outcome}  {result['seconds']:.0f} s  {alphas if len(alphas) < 80 else ''}"
        )


def _costs_wanted(study: Study, store: Store) -> list[RunTask]:
    """List the arms without a cost measurement at their chosen settings, once all runs are finished."""
    from mols_ds.apps.study.workers import RunTask

    if not study.costs:
        return []
    todo, chosen = needed(study, store)
    if todo:
        return []
    known = store.costs()
    wanted: list[RunTask] = []
    for (model, arm), best in chosen.items():
        seed = study.at(model).seeds[0]
        run = StudyRun(model, arm, best.values, seed)
        base = chosen.get((model, study.baseline))
        done = known.get(model, {}).get(arm, {}).get("run") == store.key(run)
        if base is not None and store.load(run) is not None and not done:
            wanted.append(RunTask(run, StudyRun(model, study.baseline, base.values, seed)))
    return wanted


def _here(study: Study, store: Store, jobs: int) -> list[Failure]:
    """Execute all runs in processes on this machine, then the costs one at a time."""
    from mols_ds.apps.study.workers import Pool, runs_wanted

    lines = _Lines(study, store)
    failures: list[Failure] = []
    for tasks, processes in ((runs_wanted, jobs), (_costs_wanted, 1)):
        wanted = functools.partial(tasks, study, store)
        if wanted():
            with contextlib.closing(Pool(study, store, processes)) as pool:
                failures += pool.run(wanted, lines)
    return failures


def _launched(study: Study, store: Store) -> list[Failure]:
    """Execute all runs on all ranks of this job together."""
    from mols_ds.apps.study.work import Worker
    from mols_ds.apps.study.workers import quiet_engines, runs_wanted, together
    from mols_ds.training.ranks import start_ranks

    ranks = start_ranks()
    quiet_engines()
    worker = Worker(study, store, *ranks)
    lines = _Lines(study, store)
    failures = together(worker, lambda: runs_wanted(study, store), lines)
    return failures + together(worker, lambda: _costs_wanted(study, store), lines)


# ---------------------------------------------------------------------- the report


def report(results: StudyResults, out: Path, command: str) -> None:
    """Print the chosen settings, write the report and print its files."""
    for (model, arm), best in results.chosen.items():
        edge = " (at the edge of its grid)" if best.edge else ""
        loss = best.losses[best.values]
        tell(f"{model} {arm}: {setting_text(dict(best.values))}{edge}, tuning loss {loss:.4f}")
    from mols_ds.apps.study.report import write_report

    for path in write_report(results, out, command):
        tell(f"  {path}")
