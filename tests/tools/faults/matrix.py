"""Injects one fault into one run, restarts it until it is done, and compares it with a run that nothing happened to."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mols_ds.training.trainer import TIMED
from tests.tools.faults import engines
from tests.tools.faults.engines import ENGINES, Name, Order
from tests.tools.faults.faults import BALLAST, PHASES, Fault, Kind, Phase, fired
from tests.tools.faults.launching import OTHERWISE, TIMEOUT, Launched, run_launch

RESTARTS = 3
DISK_BYTES = {"megatron": 48 << 20}
OTHER_DISK_BYTES = 16 << 20
NOT_COMPARED = TIMED


@dataclass(frozen=True)
class Case:
    engine: Name
    fault: Kind
    phase: Phase


@dataclass
class Verdict:
    """Result of a case. `problems`: empty if the run survived; `skipped`: why it could not be tried."""

    problems: list[str]
    launches: int
    seconds: float
    after_fault: float | None
    end: str
    skipped: str = ""


@dataclass
class Ended:
    """All that two runs must have in common, bit for bit."""

    ranks: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    report: dict[str, Any]
    checkpoints: list[str]


class Workshop:
    """Runs cases below one folder; runs without a fault are made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self._references: dict[Any, Ended] = {}

    def _order(self, engine: Name, out: Path, fault: Fault | None = None) -> Order:
        data = self.data / engine
        if not data.is_dir():
            data.mkdir(parents=True)
            if engine == "megatron":
                engines.write_megatron_job(ENGINES[engine], data)
        kind = fault.kind if fault is not None else ""
        return Order(engine, str(out), str(data), TIMEOUT.get(kind, OTHERWISE), fault)

    def reference(self, engine: Name, fault: Fault | None = None) -> Ended:
        """The run in one launch, without a fault, or with one that every rank has and that ends no rank."""
        key = (engine, None if fault is None else (fault.kind, fault.phase))
        if key not in self._references:
            with tempfile.TemporaryDirectory(prefix="reference_", dir=self.folder) as place:
                out = Path(place) / "out"
                if fault is not None:
                    everyone = tuple(range(ENGINES[engine].world))
                    fault = replace(fault, ranks=everyone, mark=str(Path(place) / "mark"))
                done = run_launch(self._order(engine, out, fault))
                if not done.ended_well:
                    raise RuntimeError(f"the run of {engine} without a fault failed\n{done.story}")
                self._references[key] = _ended(out, done)
        return self._references[key]

    def run(self, case: Case) -> Verdict:
        """Inject, restart, compare."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="case_", dir=self.folder) as place:
            out = Path(place) / "out"
            out.mkdir()
            try:
                with _small_disk(out, case) if case.fault == "full" else contextlib.nullcontext():
                    verdict = self._run(case, out, Path(place) / "mark")
            except DiskRefused as error:
                verdict = Verdict([], 0, 0.0, None, "", skipped=str(error))
        verdict.seconds = time.monotonic() - began
        return verdict

    def _run(self, case: Case, out: Path, mark: Path) -> Verdict:
        fault = Fault(case.fault, case.phase, _ranks(case), str(mark))
        order = self._order(case.engine, out, fault)
        done = run_launch(order)
        first, end, problems = done, _end_of(done), []
        if fired(mark) is None:
            problems.append("the fault did not fire")
        if done.hung:
            problems.append(f"ranks {done.hung} hung")
        launches = 1
        if not done.ended_well:
            problems += _half_written(out)
            _between(case, out)
            done, launches = self._restart(replace(order, fault=None, timeout=OTHERWISE), case, out)
        if not done.ended_well:
            problems.append(f"not done after {launches} launches: {done.story}")
        else:
            survivable = launches == 1 and case.fault in ("nan", "inf")
            other = self.reference(case.engine, fault if survivable else None)
            ended = _ended(out, done)
            if case.fault == "term":  # its own checkpoint is one more
                ended.checkpoints = [name for name in ended.checkpoints if name in other.checkpoints]
            problems += _differences(ended, other) + _half_written(out) + _left_over(out)
        return Verdict(problems, launches, 0.0, first.after_fault, end)

    def _restart(self, order: Order, case: Case, out: Path) -> tuple[Launched, int]:
        """Launch until all ranks end well; the full disk gets room after the second launch."""
        launches = 1
        done: Launched | None = None
        while launches <= RESTARTS and (done is None or not done.ended_well):
            done = run_launch(order)
            launches += 1
            (out / BALLAST).unlink(missing_ok=True)
        assert done is not None
        return done, launches


def _ranks(case: Case) -> tuple[int, ...]:
    """Who it happens to: another rank in each phase; what rank 0 alone does can only happen to it."""
    if case.fault in ("save-rename", "save-latest", "full"):
        return (0,)
    return ((PHASES.index(case.phase) + 1) % ENGINES[case.engine].world,)


# ------------------------------------------------------------------ between the launches


def _between(case: Case, out: Path) -> None:
    """What happens to the files of the newest checkpoint: another file in each phase, `latest` among them."""
    if case.fault not in ("flip", "truncate"):
        return
    folder = out / "checkpoints"
    newest = folder / (folder / "latest").read_text("utf-8").strip()
    files = sorted((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    manifest = newest / "manifest.json"
    middle = files[len(files) // 2]
    target = [files[-1], manifest, middle, folder / "latest", files[0]][PHASES.index(case.phase)]
    content = bytearray(target.read_bytes())
    if case.fault == "flip":
        content[len(content) // 2] ^= 1 << 4
    else:
        del content[len(content) // 2 :]
    target.write_bytes(content)


class DiskRefused(Exception):
    """This process may not mount a file system."""


@contextlib.contextmanager
def _small_disk(place: Path, case: Case) -> Iterator[None]:
    """A tmpfs at `place`, always removed afterwards."""
    size = DISK_BYTES.get(case.engine, OTHER_DISK_BYTES)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if made.returncode != 0:
        raise DiskRefused(f"no tmpfs can be mounted: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True, capture_output=True, timeout=20)


def disk_refused() -> str:
    """Why the fault "full" cannot be tried here, or nothing."""
    with tempfile.TemporaryDirectory() as place:
        try:
            with _small_disk(Path(place), Case("zero1", "full", "fixed")):
                return ""
        except (DiskRefused, OSError, subprocess.SubprocessError) as error:
            return str(error)


# ------------------------------------------------------------------ what must hold


def _ended(out: Path, done: Launched) -> Ended:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    metrics = [{key: value for key, value in line.items() if key not in NOT_COMPARED} for line in lines]
    report = json.loads((out / "mols_report" / "mols_report.json").read_text("utf-8"))
    return Ended(done.values, metrics, report, sorted(path.name for path in (out / "checkpoints").glob("step*")))


def _differences(one: Ended, other: Ended) -> list[str]:
    """What differs between the run with a fault and the one without, by name."""
    found = []
    for rank, (mine, theirs) in enumerate(zip(one.ranks, other.ranks, strict=True)):
        keys = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
        if keys:
            found.append(f"rank {rank} differs in {', '.join(keys[:6])}{' ...' if len(keys) > 6 else ''}")
    phases = [[line.get("phase") for line in run.metrics] for run in (one, other)]
    steps = [[line.get("step") for line in run.metrics] for run in (one, other)]
    if phases[0] != phases[1] or steps[0] != steps[1]:
        found.append(f"metrics.jsonl has steps {steps[0]} in phases {phases[0]}")
    elif one.metrics != other.metrics:
        odd = next(i for i, pair in enumerate(zip(one.metrics, other.metrics, strict=True)) if pair[0] != pair[1])
        found.append(f"metrics.jsonl differs from line {odd + 1} on")
    if one.report != other.report:
        found.append("the report differs")
    if one.checkpoints != other.checkpoints:
        found.append(f"the checkpoints are {one.checkpoints}, not {other.checkpoints}")
    return found


def _half_written(out: Path) -> list[str]:
    """Checkpoints under their final name that do not agree with their list of files."""
    from mols_ds.training.checkpointer import MANIFEST, Checkpointer

    folder = out / "checkpoints"
    found = []
    for place in sorted(folder.glob("step*")):
        if place.suffix:
            continue
        if not (place / MANIFEST).is_file():
            found.append(f"{place.name} has no list of files")
            continue
        listed = set(json.loads((place / MANIFEST).read_text("utf-8"))["files"])
        there = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()} - {MANIFEST}
        if listed != there:
            found.append(f"{place.name}: {sorted(listed ^ there)} listed or there, not both")
        problem = Checkpointer(folder).problem(place.name)
        if problem is not None:
            found.append(f"{place.name} is half-written: {problem}")
    return found


def _left_over(out: Path) -> list[str]:
    """What interrupted saves left and the restarted run did not clear."""
    unfinished = (".partial", ".former", ".tmp")
    rest = [path.name for path in (out / "checkpoints").iterdir() if path.suffix in unfinished]
    return [f"{', '.join(sorted(rest))} left behind"] if rest else []


def _end_of(done: Launched) -> str:
    """How the ranks of a launch ended: statuses, negative for signals."""
    return " ".join("hung" if number in done.hung else str(status) for number, status in enumerate(done.statuses))


def clear(folder: Path) -> None:
    """Remove a folder of cases; a disk still mounted below it is taken off first."""
    for place in folder.glob("case_*/out"):
        if os.path.ismount(place):
            subprocess.run(["umount", "-l", str(place)], check=False, timeout=20)
    shutil.rmtree(folder, ignore_errors=True)
