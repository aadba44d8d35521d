"""Inputs of the training loop: the job of one arm, and the interface of its engine.

`mols_ds.training.trainer` drives a `TrainBackend`: `mols_ds.training.deepspeed_backend` or
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
from mols_ds.training.checkpointer import Retention


@dataclass(frozen=True)
class TrainJob:
    """Everything to train one arm, the same on every rank except for `rank` and `shape`.

    Attributes:
        setup: the engine's config, model and held-out data.
        batches: source of the micro-batches of a step.
        shape: split of a global batch among the data-parallel ranks.
        rank: this process among all ranks of the run. Rank 0 writes metrics and shows progress.
        steps: updates to train.
        out: folder of all output.
        eval_every, save_every: updates between evaluations and between checkpoints; 0: only at the end.
        log_every: updates between lines of the metrics file.
        resume: continue from the newest checkpoint in `out`.
        changed: the resumed run has other settings than its checkpoint, which apply.
        begin: called on all ranks before the first step, after the checkpoint is loaded.
        about: the names of model, data and tokenizer, for the first line of the metrics.
        probe_ahead: mode "probe" measures the batches that training uses next, not those of the probe stream. So no arm
            of a comparison sees more text than another.
        save_at_end: save a checkpoint after the last update.
        keep: which checkpoints stay; None: all.
        profile: updates to trace on rank 0.
        stop_diverged: end when the loss is not finite, with a held-out loss of NaN.
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
    changed: bool = False
    begin: Callable[[], None] = lambda: None
    about: JsonObject = field(default_factory=dict)
    probe_ahead: bool = False
    save_at_end: bool = True
    keep: Retention | None = None
    profile: int = 0
    stop_diverged: bool = False
    preemptible: bool = False
    shown: bool = True


@dataclass
class Outcome:
    """Result of an arm: the last line of its metrics file, and the path of its report, if there is one."""

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
    """Builds an engine from its config, the model and the held-out data."""

    @property
    def section(self) -> JsonObject | None:
        """The "mols" section; None: train without MoLS."""
        ...

    @property
    def optimizer(self) -> str:
        """Name of the optimizer, for titles."""
        ...

    def with_section(self, section: JsonObject | None) -> Self:
        """Return a copy with another "mols" section."""
        ...

    def build(self, job: TrainJob) -> TrainBackend:
        """Build model and optimizer and attach MoLS. Equal seeds give equal weights. Collective."""
        ...


class StepResult(NamedTuple):
    """Result of a step.

    Attributes:
        losses: float64 on the CPU: this rank's part of the step's loss, for `TrainBackend.mean_loss`.
        updated: whether the step is an update; False if MoLS only measured.
    """

    losses: Tensor
    updated: bool


class TrainBackend(ABC):
    """Engine of one arm for the training loop. Call every method on all ranks at the same point.

    Attributes:
        mols: MoLS on this engine; phase "disabled" for an arm without it.
        rank, world: this process among all ranks of the run.
        device: of tensors in collectives.
        node_local: each node has the checkpoint files of its own ranks.
        universal: load the checkpoint that the engine's own file names, not the loop's newest.
        fixed_steps: why a resumed run cannot have more steps than its checkpoint, and what to do; empty: it can.
        option: format of a setting for users, such as "--{}".
    """

    option: ClassVar[str]
    mols: Handle
    rank: int
    world: int
    device: torch.device
    node_local: bool = False
    universal: bool = False
    fixed_steps: str = ""

    @property
    def identity(self) -> Mapping[str, object]:
        """More settings by name that a resumed run must share with its checkpoint."""
        return {}

    # -- training

    @abstractmethod
    def base_lr(self) -> float:
        """Learning rate of the next update, without multipliers."""

    @abstractmethod
    def step(self, batches: Iterator[MicroBatch], *, number: int, measures: bool) -> StepResult:
        """Run forward, backward and optimizer step for one global batch.

        Args:
            batches: this rank's micro-batches.
            number: of this update, from 1, if it is one.
            measures: MoLS measures this batch and discards the update.
        """

    @abstractmethod
    def mean_loss(self, losses: Tensor) -> float:
        """Return the step's loss from every rank's `StepResult.losses`."""

    @abstractmethod
    def held_out_sums(self) -> Tensor:
        """Return float64 [sum of losses, number of targets] over this rank's held-out data, in evaluation mode."""

    @abstractmethod
    def tokens(self, steps: int) -> int:
        """Return the tokens that `steps` updates have trained on."""

    @abstractmethod
    def parameters(self) -> Iterable[Tensor]:
        """Return this rank's weights."""

    def grad_norm(self) -> float | None:
        """Return the norm of the last update's gradient before clipping, on rank 0; None if the engine has none."""
        return None

    def snr(self) -> dict[str, float] | None:
        """Return the SNR of each group from Adam's moments after this update, if it was read; the same on all ranks."""
        return None

    def flops_per_token(self) -> float | None:
        """Return the FLOPs of forward and backward for one token; None if they are not known."""
        return None

    def peak_flops(self) -> float | None:
        """Return the nominal FLOP/s of one device in the dtype of the model; None if they are not known."""
        return None

    def after_update(self) -> None:  # noqa: B027 - most engines have nothing to do here
        """Run after each update, outside the measured time of the step."""

    def write_events(self, values: Mapping[str, float]) -> None:  # noqa: B027
        """Send values of an update to the engine's own monitors, such as TensorBoard. Rank 0 writes."""

    # -- checkpoints

    @abstractmethod
    def checkpoint_writer(self, step: int, counted: JsonObject) -> Callable[[Path], None]:
        """Prepare the checkpoint of update `step`. Returns a function that writes it into a folder.

        Args:
            step: number of updates.
            counted: the loop's counters, and settings that a resumed run must share; saved in the checkpoint.
        """

    @abstractmethod
    def load_checkpoint(self, folder: Path, tag: str | None) -> JsonObject | None:
        """Load checkpoint `tag` of `folder`; None: the one that the engine's own file names (`universal`).

        Returns:
            `counted` of `checkpoint_writer`, with the number of updates as "step"; None for another program's
            checkpoint.

        Raises:
            MolsCheckpointError: it cannot be loaded.
        """

    def use_settings(self) -> None:  # noqa: B027
        """Put this run's rate, schedule and optimizer settings over those of the loaded checkpoint."""

    @abstractmethod
    def close(self) -> None:
        """Release the engine's resources outside this process's memory, and detach MoLS."""

    # -- collectives

    def evaluate(self) -> float:
        """Return the mean loss per target over all held-out data of all ranks."""
        loss, count = self.total(self.held_out_sums()).tolist()
        return float(loss / count)

    def largest(self, value: float) -> float:
        """Return the maximum over all ranks."""
        if self.world == 1:
            return value
        moved = torch.tensor([value], dtype=torch.float32, device=self.device)
        torch.distributed.all_reduce(moved, op=torch.distributed.ReduceOp.MAX)
        return float(moved)

    def agree(self, fine: bool) -> bool:
        """Whether `fine` is True on all ranks."""
        return not self.largest(float(not fine))

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks of a float64 vector on the CPU."""
        if self.world == 1:
            return values
        moved = values.to(self.device)
        torch.distributed.all_reduce(moved)
        return moved.cpu()
