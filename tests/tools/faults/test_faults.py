"""A short form of `python -m tests.faults`: each fault once, spread over the engines and the phases."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.faults.__main__ import main, read
from tests.tools.faults.engines import Name
from tests.tools.faults.faults import FAULTS, Fault, Kind, Phase, fill
from tests.tools.faults.matrix import Case, Workshop, disk_refused

# The first of each engine pays for its run without a fault; Megatron's four ranks cost three times ZeRO's two.
CASES: list[tuple[Kind, Name, Phase]] = [
    ("kill", "zero3", "calibrating"),
    ("flip", "zero3", "ramping"),
    ("nan", "zero1", "fixed"),
    ("save-files", "zero1", "end"),
    ("save-latest", "zero1", "calibrating"),
    ("stop", "zero2", "calibrating"),
    ("term", "zero2", "calibrating"),
    ("full", "zero2", "ramping"),
    ("delay", "zero2", "end"),
    ("save-rename", "megatron", "fixed"),
]
IN_THE_MATRIX_ALONE = {"inf", "truncate"}  # the same code as nan and flip
QUICK: tuple[Kind, Name, Phase] = ("kill", "zero3", "calibrating")
# Killed in a save, as save-latest is. One loop and one keeper of checkpoints serve both engines.
FULL: list[tuple[Kind, Name, Phase]] = [("save-files", "zero1", "end"), ("save-rename", "megatron", "fixed")]


def label(case: tuple[Kind, Name, Phase]) -> str:
    """The tier of a case; each is a separate launch."""
    return "quick" if case == QUICK else "full" if case in FULL else "all"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    yield Workshop(tmp_path_factory.mktemp("faults"))


def test_the_short_form_has_every_fault() -> None:
    assert {fault for fault, _, _ in CASES} | IN_THE_MATRIX_ALONE == set(FAULTS)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("fault", "engine", "phase"),
    [pytest.param(*case, id="-".join(case), marks=pytest.mark.tier(label(case))) for case in CASES],
)
def test_a_run_survives(fault: Kind, engine: Name, phase: Phase, workshop: Workshop) -> None:
    """It ends as a run without a fault does: weights, optimizer, alphas, report, metrics, phases, checkpoints."""
    if fault == "full" and (why := disk_refused()):
        pytest.skip(why)
    verdict = workshop.run(Case(engine, fault, phase))
    assert not verdict.problems
    ends_the_run = fault != "delay"
    assert (verdict.launches > 1) == ends_the_run
    if fault == "kill":
        assert str(-signal.SIGKILL) in verdict.end.split()
    if fault == "term":
        assert set(verdict.end.split()) == {"0"}


@pytest.mark.tier("all")
def test_a_fault_that_does_not_fire_is_not_survived(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would make a whole table vacuous: the run is compared, but nothing was done to it."""
    from tests.tools.faults import matrix

    monkeypatch.setattr(matrix, "_ranks", lambda case: (7,))
    assert workshop.run(Case("zero2", "kill", "ramping")).problems == ["the fault did not fire"]


def test_only_a_small_disk_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = os.statvfs_result((4096, 4096, 10**7, 10**7, 10**7, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda folder: space)
    with pytest.raises(RuntimeError, match="not the small file system"):
        fill(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_table_is_read_back_from_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    verdict = '"launches": 2, "seconds": 3.0, "after_fault": 0.2, "end": "-9 1", "skipped": ""'
    rows = [("waiting", "[]"), ("fixed", '["rank 1 differs in alphas"]')]
    lines = []
    for phase, said in rows:
        case = f'"engine": "zero1", "fault": "kill", "phase": "{phase}"'
        lines.append(f'{{{case}, "verdict": {{"problems": {said}, {verdict}}}}}\n')
    results.write_text("".join(lines), "utf-8")
    few = ["--results", str(results), "--table", "--engines", "zero1", "--faults", "kill", "--phases"]
    assert main([*few, "waiting"]) == 0
    assert main([*few, "waiting", "end"]) == 3
    assert main([*few, "waiting", "fixed"]) == 1
    said = capsys.readouterr().out
    assert "kill zero1 fixed: rank 1 differs in alphas" in said
    assert "1 of 2 faults survived" in said
    assert read(results)[Case("zero1", "kill", "waiting")].after_fault == 0.2
    assert Fault("full", "end", (0,), "mark").in_save
