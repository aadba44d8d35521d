"""The training loop on an engine of a few lines: counting, evaluation, logs, checkpoints, resuming, stopping."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mols_ds.core.handle import Handle
from mols_ds.core.json_types import JsonObject
from mols_ds.core.phases import Phase
from mols_ds.errors import MolsCheckpointError, MolsTrainingError, MolsWarning
from mols_ds.training.batches import BatchShape, Stream
from mols_ds.training.compare import run_arms
from mols_ds.training.preemption import SIGNALS, Preempted
from mols_ds.training.progress import Progress
from mols_ds.training.train_job import Outcome, StepResult, TrainBackend, TrainJob
from mols_ds.training.trainer import METRICS, TIMED, Metrics, Trainer, has_checkpoint, probe_samples, train

SHAPE = BatchShape(length=1, micro=1, accumulation=2, rank=0, world=1)
STEPS, START, SAMPLES = 8, 3, 4
PROBE: JsonObject = {"mode": "probe", "start": START, "samples": SAMPLES, "report_dir": "reports"}
ONLINE: JsonObject = {**PROBE, "mode": "online"}


@dataclass
class Mols(Handle):
    """Calibrates from update START on, for SAMPLES batches."""

    measured: int = 0
    updates: int = 0

    @property
    def phase(self) -> Phase:
        if self.updates < START:
            return "waiting"
        return "calibrating" if self.measured < SAMPLES else "fixed"

    @property
    def alphas(self) -> dict[str, float]:
        return {"qk": 2.0} if self.measured == SAMPLES else {}

    @property
    def multipliers(self) -> dict[str, float]:
        return dict(self.alphas)


class Backend(TrainBackend):
    """One weight; the loss of a batch is the weight plus the batch's number."""

    option = "--{}"

    def __init__(self, job: TrainJob, setup: Setup) -> None:
        self.job, self.setup = job, setup
        self.rank, self.world, self.device = 0, 1, torch.device("cpu")
        self.weight = torch.zeros(1, dtype=torch.float64)
        self.mols = Handle() if setup.section is None else Mols()

    def base_lr(self) -> float:
        return 0.5

    def step(self, batches: Iterator[Any], *, number: int, measures: bool) -> StepResult:
        values = list(batches)
        losses = self.weight + sum(values) / len(values)
        self.setup.before_update(number)
        mols, counted = self.mols, not measures
        if counted:
            self.weight += values[0]
            self.setup.trained.append(number)
        if isinstance(mols, Mols):
            mols.measured += mols.phase == "calibrating"
            mols.updates += counted
        return StepResult(losses, counted)

    def mean_loss(self, losses: Tensor) -> float:
        return float(losses)

    def held_out_sums(self) -> Tensor:
        self.setup.evaluated.append(self.setup.trained[-1] if self.setup.trained else 0)
        return torch.tensor([float(self.weight), 2.0], dtype=torch.float64)

    def tokens(self, steps: int) -> int:
        return steps * self.job.shape.tokens

    def parameters(self) -> Iterable[Tensor]:
        return [self.weight]

    def checkpoint_writer(self, step: int, counted: dict[str, Any]) -> Callable[[Path], None]:
        state = {"counted": {**counted, "step": step}, "weight": float(self.weight), "mols": vars(self.mols)}
        return lambda place: (place / "state.json").write_text(json.dumps(state)) and None

    def load_checkpoint(self, folder: Path, tag: str | None) -> dict[str, Any] | None:
        state = json.loads((folder / str(tag) / "state.json").read_text())
        self.weight.fill_(state["weight"])
        vars(self.mols).update(state["mols"])
        counted: dict[str, Any] | None = state["counted"]
        return counted

    def close(self) -> None:
        self.setup.closed += 1


BACKENDS: list[Backend] = []
"""All that were built, the newest last."""


@dataclass
class Setup:
    """A `TrainSetup` that notes what its engines do. `before_update` gets the number of the update."""

    section: JsonObject | None = None
    before_update: Callable[[int], object] = lambda number: None
    optimizer: str = "AdamW"
    trained: list[int] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    built: list[tuple[str, JsonObject | None, bool]] = field(default_factory=list)
    closed: int = 0

    def with_section(self, section: JsonObject | None) -> Setup:
        return replace(self, section=section)

    def build(self, job: TrainJob) -> Backend:
        self.built.append((job.out.name, self.section, job.resume))
        BACKENDS.append(Backend(job, self))
        return BACKENDS[-1]


class Numbered:
    """Batches whose values are their positions, those of the probe stream from 1000 on; records the requests."""

    def __init__(self) -> None:
        self.asked: list[tuple[Stream, int]] = []

    def step(self, stream: Stream, step: int) -> Iterator[float]:
        self.asked.append((stream, step))
        yield from [step + 1000.0 * (stream == "probe")] * SHAPE.accumulation


def job_of(out: Path, section: JsonObject | None = None, **changes: Any) -> TrainJob:
    before_update = changes.pop("before_update", lambda number: None)
    setup = Setup(section, before_update)
    job = TrainJob(setup=setup, batches=Numbered(), shape=SHAPE, rank=0, steps=STEPS, out=out, seed=1, shown=False)
    return replace(job, **changes)


@pytest.fixture(autouse=True)
def signals_are_put_back() -> Iterator[None]:
    """A process that was preempted ignores further signals."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def setup_of(job: TrainJob) -> Setup:
    assert isinstance(job.setup, Setup)
    return job.setup


def lines_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def saved_in(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("step*"))


TRAINED = [("train", step) for step in range(STEPS)]
AHEAD = [("train", START + i) for i in range(SAMPLES)]
OWN = [("probe", i) for i in range(SAMPLES)]


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


class Killed(Exception):
    pass


def kill_at(update: int) -> Callable[[int], None]:
    def kill(number: int) -> None:
        if number == update:
            raise Killed

    return kill


@pytest.mark.parametrize("section", [PROBE, ONLINE], ids=["probe", "online"])
@pytest.mark.parametrize("probe_ahead", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(section: JsonObject, probe_ahead: bool, tmp_path: Path) -> None:
    changes = {"save_every": 3, "eval_every": 2, "probe_ahead": probe_ahead}
    whole = train(job_of(tmp_path / "whole", section, **changes))
    with pytest.raises(Killed):
        train(job_of(tmp_path / "part", section, before_update=kill_at(6), **changes))
    assert [line["step"] for line in lines_of(tmp_path / "part")] == [1, 2, 3, 4, 5]
    with (tmp_path / "part" / METRICS).open("a") as file:
        file.write('{"step": 6, "lo')
    job = job_of(tmp_path / "part", section, resume=True, **changes)
    outcome = train(job)
    assert setup_of(job).trained == [4, 5, 6, 7, 8]
    assert replace(outcome, seconds=0.0) == replace(whole, seconds=0.0)
    assert lines_of(tmp_path / "part") == lines_of(tmp_path / "whole")
    assert saved_in(tmp_path / "part") == saved_in(tmp_path / "whole")


def test_a_run_resumed_at_its_end_evaluates_and_saves_nothing(tmp_path: Path) -> None:
    first = train(job_of(tmp_path, PROBE))
    before = (tmp_path / "checkpoints" / "step8").stat().st_ino
    job = job_of(tmp_path, PROBE, resume=True)
    assert replace(train(job), seconds=0.0) == replace(first, seconds=0.0)
    assert setup_of(job).evaluated == [0]
    assert (tmp_path / "checkpoints" / "step8").stat().st_ino == before


@pytest.mark.parametrize(("changes", "made"), [({"seed": 2}, "--seed 1, not 2"), ({"steps": 7}, "--steps 8, not 7")])
def test_another_run_s_checkpoint_is_refused(changes: dict[str, Any], made: str, tmp_path: Path) -> None:
    train(job_of(tmp_path))
    with pytest.raises(MolsCheckpointError, match=f"^--resume: the checkpoint was made with {made}$"):
        train(job_of(tmp_path, resume=True, **changes))


def test_a_finished_run_is_extended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about: JsonObject = {"model": "m", "data": "d", "tokenizer": "t"}
    longer = job_of(tmp_path / "whole", PROBE, steps=12, eval_every=4, about=about)
    whole = train(longer)
    train(job_of(tmp_path / "part", PROBE, eval_every=4, about=about))
    rest = job_of(tmp_path / "part", PROBE, steps=12, eval_every=4, about=about, resume=True)
    assert replace(train(rest), seconds=0.0) == replace(whole, seconds=0.0)
    assert setup_of(rest).trained == [9, 10, 11, 12]
    lines = lines_of(tmp_path / "part")
    assert lines == lines_of(tmp_path / "whole")
    assert [line.get("run") for line in lines] == [about, *[None] * 12]
    said = "--resume: extended from 8 to 12 steps; by this run's schedule the rate of step 9 stays 0.5"
    assert said in capsys.readouterr().out.splitlines()


def test_an_engine_that_cannot_be_extended_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(job_of(tmp_path))
    monkeypatch.setattr(Backend, "extendable", False)
    with pytest.raises(MolsCheckpointError, match=r"--steps 8, not 9$"):
        train(job_of(tmp_path, steps=9, resume=True))


def test_another_program_s_checkpoint_is_refused(tmp_path: Path) -> None:
    train(job_of(tmp_path))
    state = tmp_path / "checkpoints" / "step8" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "counted": None}))
    (state.parent / "manifest.json").unlink()
    with pytest.raises(MolsCheckpointError, match="holds no checkpoint of this program"):
        train(job_of(tmp_path, resume=True))


def test_a_checkpoint_without_a_count_of_batches_ahead_loads(tmp_path: Path) -> None:
    """train_megatron.py of 0.4.0 wrote none."""
    train(job_of(tmp_path, save_every=4))
    state = tmp_path / "checkpoints" / "step4" / "state.json"
    content = json.loads(state.read_text())
    del content["counted"]["ahead"]
    state.write_text(json.dumps(content))
    (state.parent / "manifest.json").unlink()
    job = job_of(tmp_path, resume=True)
    trainer = Trainer(job, job.setup.build(job))
    (tmp_path / "checkpoints" / "latest").write_text("step4")
    trainer.load()
    assert (trainer.updates, trainer.ahead, trainer.saved) == (4, 0, 4)


@pytest.mark.parametrize("probe_ahead", [False, True])
@pytest.mark.parametrize("during", [2, START + 1], ids=["update", "probe"])
def test_a_signal_saves_ends_and_the_next_launch_goes_on(during: int, probe_ahead: bool, tmp_path: Path) -> None:
    """The signal comes in the step that makes update 2, or in the first one that is only measured."""
    whole = train(job_of(tmp_path / "whole", PROBE, probe_ahead=probe_ahead))

    def hears(number: int) -> None:
        if number == during:
            os.kill(os.getpid(), signal.SIGTERM)

    after = 2 if during == 2 else START
    message = f"stopped by SIGTERM after step {after}; --resume continues from there"
    part = job_of(tmp_path / "part", PROBE, preemptible=True, probe_ahead=probe_ahead, before_update=hears)
    with pytest.raises(Preempted, match=f"^{message}$"):
        train(part)
    assert setup_of(part).closed == 1
    assert saved_in(tmp_path / "part") == [f"step{after}"]
    rest = job_of(tmp_path / "part", PROBE, probe_ahead=probe_ahead, resume=True)
    assert replace(train(rest), seconds=0.0) == replace(whole, seconds=0.0)
    assert lines_of(tmp_path / "part") == lines_of(tmp_path / "whole")
    assert isinstance(part.batches, Numbered) and isinstance(rest.batches, Numbered)
    asked = part.batches.asked + rest.batches.asked
    assert asked == TRAINED[:START] + (AHEAD if probe_ahead else OWN) + TRAINED[START:]


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    def hears(number: int) -> None:
        if number == STEPS:
            os.kill(os.getpid(), signal.SIGUSR1)

    train(job_of(tmp_path, preemptible=True, before_update=hears))
    assert lines_of(tmp_path)[-1]["final"] is True


def infinite_at(update: int) -> Callable[[int], None]:
    """Makes the weight infinite in `update`, whose own loss is still finite."""

    def spoil(number: int) -> None:
        if number == update:
            BACKENDS[-1].weight.fill_(torch.inf)

    return spoil


def test_a_diverged_run_ends_where_it_may(tmp_path: Path) -> None:
    job = job_of(tmp_path, stop_diverged=True, save_at_end=False, before_update=infinite_at(3))
    outcome = train(job)
    assert outcome.val_loss != outcome.val_loss
    assert setup_of(job).trained == [1, 2, 3, 4]
    assert outcome.tokens == 4 * SHAPE.tokens


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(MolsTrainingError, match="the weights are not finite after step 4"):
        train(job_of(tmp_path, save_every=2, before_update=infinite_at(4)))
    assert saved_in(tmp_path) == ["step2"]


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
def test_a_comparison_trains_adam_without_a_section_first(tmp_path: Path) -> None:
    section = {**PROBE, "report_dir": str(tmp_path / "mols_report")}
    job = job_of(tmp_path, section)
    built = setup_of(job).built
    assert run_arms(job, compare=True) == [tmp_path / "adam", tmp_path / "mols"]
    moved = {**section, "report_dir": str(tmp_path / "mols" / "mols_report")}
    assert built == [("adam", None, False), ("mols", moved, False)]
    summary = json.loads((tmp_path / "compare.json").read_text())
    assert summary["mols"]["alphas"] == {"qk": 2.0} and summary["adam"]["alphas"] == {}
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
