"""Failures while rank 0 alone prints or writes do not end it: with two ranks, both continue together."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import resource
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mols_ds.core.log import LOG
from mols_ds.errors import MolsWarning
from mols_ds.training.deepspeed_backend import DeepSpeedBackend
from tests.engines.deepspeed.engines import config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.helpers.harness import Results, run_cases, run_ranks
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

# Warnings: alphas at their bounds, and a calibration that ends after the ramp.
SECTION = {"start": 0, "ramp_end": 2, "samples": 4, "mode": "online", "alpha_min": 0.99, "alpha_max": 1.01}
SECTION |= {"noise_floor_correction": False}
STEPS = 6
Fault = contextlib.AbstractContextManager[object]


@contextlib.contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def warnings_as_errors() -> Iterator[None]:
    """As `python -W error::mols_ds.errors.MolsWarning` or PYTHONWARNINGS."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", MolsWarning)
        yield


@contextlib.contextmanager
def failing_handler() -> Iterator[None]:
    class Handler(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise RuntimeError("the log collector is gone")

    handler = Handler()
    LOG.addHandler(handler)
    level = LOG.level
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)


@contextlib.contextmanager
def broken_pipe() -> Iterator[None]:
    read, write = os.pipe()
    os.close(read)
    file = os.fdopen(write, "w")
    with changed(sys, "stdout", file), changed(sys, "stderr", file):
        yield
    with contextlib.suppress(OSError):
        file.close()


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow: write() fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def matplotlib_is(module: Any) -> Iterator[None]:
    kept = {name: found for name, found in sys.modules.items() if name.split(".")[0] == "matplotlib"}
    kept |= {name: sys.modules[name] for name in ("mols_ds.report.plot",) if name in sys.modules}
    for name in kept:
        del sys.modules[name]
    if module is not None:
        sys.modules["matplotlib"] = module
    before = os.environ.get("MPLBACKEND")
    os.environ["MPLBACKEND"] = "nonsense"
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
            del sys.modules[name]
        sys.modules.update(kept)
        os.environ.pop("MPLBACKEND")
        if before is not None:
            os.environ["MPLBACKEND"] = before


def refuse(message: object, category: type[Warning], *_: Any, **__: Any) -> None:
    """In the place of warnings.showwarning; stock warnings are not for us to guard."""
    if issubclass(category, MolsWarning):
        raise OSError("no space left on device")


FAULTS: dict[str, Callable[[], Fault]] = {
    "none": contextlib.nullcontext,
    "warnings are errors": warnings_as_errors,
    "nobody can show a warning": lambda: changed(warnings, "showwarning", refuse),
    "a log handler fails": failing_handler,
    "stdout is closed": broken_pipe,
    "the disk is full": full_disk,
    "MPLBACKEND is wrong": lambda: matplotlib_is(None),
    "matplotlib is broken": lambda: matplotlib_is(types.ModuleType("matplotlib")),
    "report_dir is a file": contextlib.nullcontext,
    "report_dir cannot be made": contextlib.nullcontext,
}


def monitored() -> tuple[int, int, list[str]]:
    """A job's engine whose monitor fails on rank 0, where DeepSpeed calls it in its step: steps, calls, warnings."""
    calls: list[object] = []

    def fail(events: object) -> None:
        calls.append(events)
        raise OSError("no space left on device")

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        board = {"enabled": True, "output_path": folder, "job_name": "job"}
        engine = engine_of(config(1, SECTION | {"report_dir": folder}, csv_monitor=board))
        shape = types.SimpleNamespace(rank=dist.get_rank(), world=2)
        job: Any = types.SimpleNamespace(shape=shape)
        setup: Any = types.SimpleNamespace(task=None, config={})
        if dist.get_rank() == 0:
            engine.monitor.csv_monitor.write_events = fail
        backend = DeepSpeedBackend(job, setup, engine)
        for step in range(2):
            iterate(engine, step)
        backend.write_events({"loss": 1.0})
    return engine.global_steps, len(calls), [str(w.message) for w in said if "monitor" in str(w.message)]


@pytest.mark.tier("all")
def test_deepspeeds_monitor_cannot_end_a_job() -> None:
    (steps, calls, said), other = run_ranks(monitored, 2)
    assert other == (2, 0, []) and steps == 2 and calls >= 3
    assert said == ["monitor: not written (OSError: no space left on device); training continues"]


def locked() -> list[list[str]]:
    """Messages of both kinds of jobs, on each rank, about a lock of a killed compilation."""
    from mols_ds.training import megatron_build, ranks

    found = []
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder, "fused_adam", "lock")
        lock.parent.mkdir()
        lock.touch()
        os.utime(lock, (0, 0))
        kept = {name: os.environ.get(name) for name in ("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        os.environ.update(dict.fromkeys(kept, folder))
        for start in (ranks.start_ranks, megatron_build.start_ranks):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                start()
            found.append([str(w.message).replace(str(lock), "LOCK") for w in said if "lock" in str(w.message)])
        for name, value in kept.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    return found


@pytest.mark.tier("all")
def test_every_kind_of_job_names_a_stale_lock_once_a_node() -> None:
    first, second = run_ranks(locked, 2)
    assert second == [[], []] and [len(lines) for lines in first] == [1, 1]
    assert all(line.startswith("LOCK: left by a killed compilation") for (line,) in first)


CASES = Cases(
    [(stage, fault) for fault in FAULTS for stage in (1, 3)],
    quick=[(3, fault) for fault in ("warnings are errors", "a log handler fails", "the disk is full")],
)


def train(stage: int, fault: str) -> tuple[Any, ...]:
    """What a rank has after STEPS steps with a fault: rank 0's alone, but for filters of warnings, which all have."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"report_dir is a file": __file__, "report_dir cannot be made": "/proc/nothing"}
        section = {**SECTION, "report_dir": places.get(fault, folder)}
        hit = dist.get_rank() == 0 or fault == "warnings are errors"
        with warnings.catch_warnings(), FAULTS[fault]() if hit else contextlib.nullcontext():
            if not hit:
                warnings.simplefilter("ignore")
            engine = engine_of(config(stage, section))
            losses = [iterate(engine, step) for step in range(STEPS)]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, engine.mols.multipliers)
        written = Path(folder, "mols_report.json").is_file()
        return engine.global_steps, engine.mols.phase, engine.mols.multipliers, len(losses), everyone, written


@functools.cache
def results() -> Results:
    return run_cases(train, 2, CASES.wanted)


@CASES.parametrize(("stage", "fault"))
def test_both_ranks_go_on(stage: int, fault: str) -> None:
    first, second = results()[stage, fault]
    steps, phase, multipliers, count, everyone, written = first
    assert (steps, phase, count) == (STEPS, "fixed", STEPS) == (second[0], second[1], second[3])
    assert everyone == [multipliers] * 2 and set(multipliers.values()) != {1.0}
    lost = {"the disk is full", "report_dir is a file", "report_dir cannot be made"}
    assert written is (fault not in lost)
