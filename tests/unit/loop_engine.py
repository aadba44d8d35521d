"""The training loop's jobs on an engine of a few lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mols_ds.core.handle import Handle
from mols_ds.core.json_types import JsonObject
from mols_ds.core.phases import Phase
from mols_ds.training.batches import BatchShape, Stream
from mols_ds.training.train_job import StepResult, TrainBackend, TrainJob
from mols_ds.training.trainer import METRICS, TIMED

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
