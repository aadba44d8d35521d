"""What the training loop gets: the job of one arm, and the interface of the engine that trains it.

`mols_ds.training.trainer` drives a `TrainBackend`. There are two: `mols_ds.training.deepspeed_backend` and
`mols_ds.apps.train_megatron.backend`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from mols_ds.core.handle import Handle
from mols_ds.core.json_types import JsonObject
from mols_ds.training.batches import Batches, BatchShape, MicroBatch


@dataclass(frozen=True)
class TrainJob:
    """What one arm trains and how, the same on every rank but for `rank` and `shape`.

    Attributes:
        setup: the engine's config, model and held-out data.
        batches: where the micro-batches of a step come from.
        shape: how a global batch is split among the data-parallel ranks.
        rank: this process among all ranks of the run. Rank 0 writes the metrics and shows the progress.
        steps: updates to train.
        out: folder of everything that is written.
        eval_every, save_every: updates between evaluations and between checkpoints; 0: at the end only.
        log_every: updates between lines of the metrics file.
        resume: continue from the newest checkpoint in `out`.
        probe_ahead: mode "probe" measures the batches that training takes next, not batches of the probe stream. No
            arm of a comparison then sees a text that another does not.
        keep_last: save a checkpoint after the last update.
        stop_diverged: end where the loss is not finite, with a held-out loss of NaN.
        preemptible: SIGTERM and SIGUSR1 end the run with a checkpoint.
        shown: rank 0 shows the progress.
    """

    setup: TrainSetup
    batches: Batches
    shape: BatchShape
    rank: int
    steps: int
    out: Path
    seed: int
    eval_every: int = 0
    save_every: int = 0
    log_every: int = 1
    resume: bool = False
    probe_ahead: bool = False
    keep_last: bool = True
    stop_diverged: bool = False
    preemptible: bool = False
    shown: bool = True


@dataclass
class Outcome:
    """The result of an arm: the last line of its metrics file, and where the report is, if one was written."""

    val_loss: float
    tokens: int
    alphas: dict[str, float] = field(default_factory=dict)
    report: Path | None = None
    probe_steps: int = 0
    seconds: float = 0.0

    @property
    def val_ppl(self) -> float:
        """exp of the held-out loss."""
        return math.exp(min(self.val_loss, 700.0))


class TrainSetup(Protocol):
    """What an engine is built from: its config, the model and the held-out data."""

    @property
    def section(self) -> JsonObject | None:
        """The "mols" section; None: train without MoLS."""
        ...

    @property
    def optimizer(self) -> str:
        """Name of the optimizer, for titles."""
        ...

    def with_section(self, section: JsonObject | None) -> Self:
        """A copy with another "mols" section."""
        ...

    def build(self, job: TrainJob) -> TrainBackend:
        """Builds model and optimizer, with MoLS attached. Equal weights for equal seeds. Collective."""
        ...


class StepResult(NamedTuple):
    """What a step returns.

    Attributes:
        losses: float64, on the CPU: this rank's part of the step's loss, for `TrainBackend.mean_loss`.
        updated: whether the step counts as an update. False where MoLS only measured.
    """

    losses: Tensor
    updated: bool


class TrainBackend(ABC):
    """The engine of one arm as the training loop drives it. Call every method on all ranks at the same point.

    Attributes:
        mols: MoLS on this engine; its phase is "disabled" where the arm trains without.
        rank, world: this process among all ranks of the run.
        device: where collectives take their tensors.
        node_local: each node keeps the checkpoint files of its own ranks.
        universal: load the checkpoint that the engine's own file names, not the newest that the loop saved.
        option: how a setting is written for the user, such as "--{}".
    """

    option: ClassVar[str]
    mols: Handle
    rank: int
    world: int
    device: torch.device
    node_local: bool = False
    universal: bool = False

    @property
    def identity(self) -> Mapping[str, object]:
        """Further settings by name that a resumed run must share with its checkpoint."""
        return {}

    # -- training

    @abstractmethod
    def base_lr(self) -> float:
        """The rate of the next update, before any group's multiplier."""

    @abstractmethod
    def step(self, batches: Iterator[MicroBatch], *, number: int, measures: bool) -> StepResult:
        """Forward, backward and optimizer step of one global batch.

        Args:
            batches: this rank's micro-batches.
            number: of this update, from 1, if it becomes one.
            measures: MoLS measures this batch and discards the update.
        """

    @abstractmethod
    def mean_loss(self, losses: Tensor) -> float:
        """The step's loss from every rank's `StepResult.losses`."""

    @abstractmethod
    def held_out_sums(self) -> Tensor:
        """float64 [sum of the losses, number of targets] over this rank's held-out data, in evaluation mode."""

    @abstractmethod
    def tokens(self, steps: int) -> int:
        """Tokens that `steps` updates have trained on."""

    @abstractmethod
    def parameters(self) -> Iterable[Tensor]:
        """This rank's weights."""

    def after_update(self) -> None:  # noqa: B027 - most engines have nothing to do here
        """Called after each update, outside the measured time of the step."""

    def write_events(self, values: Mapping[str, float]) -> None:  # noqa: B027
        """Sends values of an update to the engine's own monitors, such as TensorBoard. Rank 0 writes."""

    # -- checkpoints

    @abstractmethod
    def checkpoint_writer(self, step: int, counted: JsonObject) -> Callable[[Path], None]:
        """Prepares the checkpoint of update `step`. The result writes it into a folder.

        Args:
            counted: what the loop counts, and the settings that a resumed run must share. Goes into the checkpoint.
        """

    @abstractmethod
    def load_checkpoint(self, folder: Path, tag: str | None) -> JsonObject | None:
        """Loads checkpoint `tag` of `folder`; None: the one that the engine's own file names (`universal`).

        Returns:
            `counted` of `checkpoint_writer`, with the number of updates as "step"; None for another program's.

        Raises:
            MolsCheckpointError: it cannot be loaded.
        """

    @abstractmethod
    def close(self) -> None:
        """Frees what the engine holds outside this process's memory and takes MoLS off."""

    # -- all ranks together

    def evaluate(self) -> float:
        """Mean loss per target over all held-out data of all ranks."""
        loss, count = self.total(self.held_out_sums()).tolist()
        return float(loss / count)

    def largest(self, value: float) -> float:
        """The maximum over all ranks."""
        if self.world == 1:
            return value
        moved = torch.tensor([value], dtype=torch.float32, device=self.device)
        torch.distributed.all_reduce(moved, op=torch.distributed.ReduceOp.MAX)
        return float(moved)

    def agree(self, fine: bool) -> bool:
        """Whether all ranks say yes."""
        return not self.largest(float(not fine))

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks of a float64 vector, on the CPU."""
        if self.world == 1:
            return values
        moved = values.to(self.device)
        torch.distributed.all_reduce(moved)
        return moved.cpu()
