"""The training loop on an engine of a few lines: counting, evaluation, logs, checkpoints, comparisons."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mols_ds.core.json_types import JsonObject
from mols_ds.errors import MolsWarning
from mols_ds.training.batches import Stream
from mols_ds.training.compare import run_arms
from mols_ds.training.profiling import SKIPPED
from mols_ds.training.progress import Progress
from mols_ds.training.train_job import Outcome
from mols_ds.training.trainer import METRICS, Metrics, has_checkpoint, probe_samples, train
from tests.unit.loop_engine import (
    AHEAD,
    ONLINE,
    OWN,
    PROBE,
    SAMPLES,
    SHAPE,
    START,
    STEPS,
    TRAINED,
    Backend,
    Numbered,
    job_of,
    lines_of,
    saved_in,
    setup_of,
)


@pytest.mark.parametrize(
    ("section", "changes", "measured"),
    [(None, {}, []), (ONLINE, {}, []), (PROBE, {}, OWN), (PROBE, {"probe_ahead": True}, AHEAD)],
    ids=["none", "online", "probe", "probe-ahead"],
)
def test_each_mode_trains_all_updates_on_the_same_batches(
    section: JsonObject | None, changes: dict[str, Any], measured: list[tuple[Stream, int]], tmp_path: Path
) -> None:
    """What is measured without an update comes between two updates, and moves neither the count nor the data."""
    job = job_of(tmp_path, section, **changes)
    outcome = train(job)
    assert isinstance(job.batches, Numbered)
    assert job.batches.asked == TRAINED[:START] + measured + TRAINED[START:]
    assert setup_of(job).trained == list(range(1, STEPS + 1))
    assert outcome.probe_steps == len(measured)
    assert outcome.tokens == STEPS * SHAPE.tokens
    assert [line.get("step") for line in lines_of(tmp_path)] == [*range(1, STEPS + 1), None]
    assert setup_of(job).closed == 1


def test_lines_of_the_metrics_have_their_keys_in_order(tmp_path: Path) -> None:
    outcome = train(job_of(tmp_path, PROBE, eval_every=4))
    *steps, final = lines_of(tmp_path)
    for line in steps:
        evaluated = ["val_loss"] if line["step"] in (4, 8) else []
        off = ["step_seconds", "tokens_per_second", "memory_bytes"]
        assert [key for key in line if key not in (*off, "snr")] == [
            "step", "tokens", "loss", *evaluated, "lr", "multipliers", "phase", "applied_lrs",
        ]  # fmt: skip
    assert [line["phase"] for line in steps] == ["waiting"] * 2 + ["calibrating"] + ["fixed"] * 5
    assert [line["multipliers"] for line in steps] == [{}] * 3 + [{"qk": 2.0}] * 5
    assert [line["loss"] for line in steps] == [sum(range(step)) for step in range(1, STEPS + 1)]
    assert final == {
        "final": True, "val_loss": 14.0, "val_ppl": outcome.val_ppl, "tokens": STEPS * SHAPE.tokens,
        "alphas": {"qk": 2.0},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "evaluated", "saved", "logged"),
    [
        ({}, [8], ["step8"], [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"eval_every": 3, "save_every": 3, "log_every": 3}, [3, 6, 8], ["step3", "step6", "step8"], [3, 6, 8]),
        ({"eval_every": 5, "save_every": 4, "log_every": 4}, [5, 8], ["step4", "step8"], [4, 5, 8]),
        ({"save_at_end": False, "log_every": 7}, [8], [], [7, 8]),
    ],
)
def test_schedules_of_evaluations_checkpoints_and_lines(
    changes: dict[str, Any], evaluated: list[int], saved: list[str], logged: list[int], tmp_path: Path
) -> None:
    job = job_of(tmp_path, **changes)
    train(job)
    assert setup_of(job).evaluated == evaluated
    assert saved_in(tmp_path) == saved
    assert [line["step"] for line in lines_of(tmp_path)[:-1]] == logged


@pytest.mark.parametrize("updates", [2, STEPS])
def test_a_profile_traces_the_updates_asked_for_after_the_warm_up(updates: int, tmp_path: Path) -> None:
    """A run that ends before has those that there are, and an empty one."""
    train(job_of(tmp_path, profile=updates))
    events = json.loads((tmp_path / "profile" / "trace.json").read_text("utf-8"))["traceEvents"]
    traced = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    begin = SKIPPED + 1  # the profiler counts from 0
    assert traced == {f"ProfilerStep#{number}" for number in range(begin, min(begin + updates, STEPS + 1))}


def test_the_share_of_time_spent_waiting_for_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each micro-batch takes 3 s, and the rest of a step 2 s."""
    now = 0.0

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Slow(Numbered):
        def step(self, stream: Stream, step: int) -> Iterator[float]:
            for value in super().step(stream, step):
                spend(3)
                yield value

    for module in ("trainer", "speed"):
        monkeypatch.setattr(f"mols_ds.training.{module}.time", SimpleNamespace(monotonic=lambda: now))
    train(job_of(tmp_path / "out", batches=Slow(), before_update=lambda _: spend(2), shown=True))
    assert "out: 75.0% of the steps' time was spent waiting for data" in capsys.readouterr().out.splitlines()


def test_ranks_but_the_first_write_no_metrics(tmp_path: Path) -> None:
    train(job_of(tmp_path, rank=1))
    assert not (tmp_path / METRICS).exists() and has_checkpoint(tmp_path)


def test_only_mode_probe_discards_updates() -> None:
    assert probe_samples(PROBE) == SAMPLES
    assert probe_samples({**PROBE, "samples": "auto", "max_samples": 40}) == 40
    assert not probe_samples(ONLINE)
    assert not probe_samples(None)


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.usefixtures("no_plot")
def test_a_comparison_trains_adam_without_a_section_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = {**PROBE, "report_dir": str(tmp_path / "mols_report")}
    job = job_of(tmp_path, section)
    built = setup_of(job).built
    assert run_arms(job, compare=True) == [tmp_path / "adam", tmp_path / "mols"]
    moved = {**section, "report_dir": str(tmp_path / "mols" / "mols_report")}
    assert built == [("adam", None, False), ("mols", moved, False)]
    summary = json.loads((tmp_path / "compare.json").read_text())
    assert summary["mols"]["alphas"] == {"qk": 2.0} and summary["adam"]["alphas"] == {}
    *_, heading, report, own, study = capsys.readouterr().out.splitlines()
    assert heading == "Next:" and report.startswith(f"  mols-ds report {tmp_path / 'mols'}: ")
    assert own.startswith("  --data FOLDER, ") and study.startswith("  mols-ds compare studies/laptop.yaml: ")
    # An interrupted comparison may not have begun its second arm
    (tmp_path / "mols" / "checkpoints").rename(tmp_path / "elsewhere")
    built.clear()
    run_arms(replace(job, resume=True), compare=True)
    assert [(name, resume) for name, _, resume in built] == [("adam", True), ("mols", False)]


@pytest.mark.usefixtures("no_plot")
def test_a_report_that_the_user_placed_stays_there(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mols_report.json").touch()
    section = {**PROBE, "report_dir": str(tmp_path / "mine")}
    job = job_of(tmp_path, section)
    run_arms(job, compare=True)
    assert setup_of(job).built[1][1] == section
    outcome: Outcome = train(job_of(tmp_path / "one", section))
    assert outcome.report == tmp_path / "mine" / "mols_report.json"


def test_what_fails_beside_training_is_a_warning_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk under the metrics and a monitor that raises: one rank alone would leave the loop."""

    def fail(*_: object) -> None:
        raise ValueError("no\nspace")

    whole = train(job_of(tmp_path / "whole"))
    monkeypatch.setattr(Metrics, "write", fail)
    monkeypatch.setattr(Backend, "write_events", fail)
    with pytest.warns(MolsWarning) as said:
        outcome = train(job_of(tmp_path / "failing"))
    assert outcome.val_loss == whole.val_loss
    assert sorted(str(warning.message) for warning in said) == [
        "metrics: not written (ValueError: no space); training continues",
        "monitor: not written (ValueError: no space); training continues",
    ]


@pytest.mark.parametrize("resume", [False, True])
def test_a_metrics_file_that_cannot_be_begun_is_a_warning(tmp_path: Path, resume: bool) -> None:
    out = tmp_path / "out"
    if resume:
        train(job_of(out))
        (out / METRICS).unlink()
    (out / METRICS).mkdir(parents=True)
    with pytest.warns(MolsWarning, match=r"metrics: not written \("):
        outcome = train(job_of(out, resume=resume))
    assert outcome.val_loss == train(job_of(tmp_path / "whole")).val_loss


def test_a_progress_bar_that_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("gone")

    monkeypatch.setattr(Progress, "update", fail)
    monkeypatch.setattr(Progress, "close", fail)
    with pytest.warns(MolsWarning, match=r"progress: not written \(OSError: gone\)"):
        train(job_of(tmp_path))
