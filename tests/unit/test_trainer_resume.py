"""Runs that end before their last update: resumed, extended, stopped by a signal, diverged."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mols_ds.core.json_types import JsonObject
from mols_ds.errors import MolsCheckpointError, MolsTrainingError
from mols_ds.training.preemption import SIGNALS, Preempted
from mols_ds.training.trainer import METRICS, Trainer, train
from tests.unit.loop_engine import (
    AHEAD,
    BACKENDS,
    ONLINE,
    OWN,
    PROBE,
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


@pytest.fixture(autouse=True)
def signals_are_put_back() -> Iterator[None]:
    """A process that was preempted ignores further signals."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
    monkeypatch.setattr(Backend, "fixed_steps", "the reason")
    with pytest.raises(MolsCheckpointError, match=r"--steps 8, not 9: the reason$"):
        train(job_of(tmp_path, steps=9, resume=True))
    with pytest.raises(MolsCheckpointError, match=r"--steps 8, not 7$"):
        train(job_of(tmp_path, steps=7, resume=True))


def test_another_program_s_checkpoint_is_refused(tmp_path: Path) -> None:
    train(job_of(tmp_path))
    state = tmp_path / "checkpoints" / "step8" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "counted": None}))
    (state.parent / "manifest.json").unlink()
    with pytest.raises(MolsCheckpointError, match="contains no checkpoint of this program"):
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
