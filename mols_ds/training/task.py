"""Definition of a micro-batch and its loss. `NextTokens` is pre-training; `finetune.task` trains on answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from mols_ds.training.batches import BatchShape, MicroBatch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Task(Protocol):
    """A training task on a DeepSpeed engine. Call every method on all ranks at the same point."""

    partial: bool
    """Whether checkpoints omit frozen weights, which are loaded from elsewhere."""
    identity: Mapping[str, object]
    """More arguments by name that a resumed run must share with its checkpoint."""

    def loss(self, engine: DeepSpeedEngine, batch: MicroBatch) -> Tensor:
        """Return a micro-batch's loss. A step descends the mean over its micro-batches and ranks."""
        ...

    def held_out(self, engine: DeepSpeedEngine, batch: MicroBatch, valid: int) -> tuple[float, int]:
        """Return (sum of losses, number of targets) over the first `valid` sequences of a held-out micro-batch."""
        ...

    def tokens(self, steps: int) -> int:
        """Return the tokens that `steps` steps have trained on."""
        ...

    def save(self, engine: DeepSpeedEngine, folder: Path) -> None:
        """Write more files of a checkpoint."""
        ...


class NextTokens:
    """Predict every token of packed sequences from those before it. A batch is int64 of shape (micro, length)."""

    partial = False

    def __init__(self, shape: BatchShape) -> None:
        self.shape = shape
        self.identity: Mapping[str, object] = {}

    def loss(self, engine: DeepSpeedEngine, batch: Tensor) -> Tensor:
        """See `Task`: the mean over the micro-batch's tokens; all micro-batches have the same number."""
        ids = batch.to(engine.device)
        loss: Tensor = engine(input_ids=ids, labels=ids).loss
        return loss

    def held_out(self, engine: DeepSpeedEngine, batch: Tensor, valid: int) -> tuple[float, int]:
        """See `Task`."""
        ids = batch.to(engine.device)
        logits = engine(input_ids=ids).logits
        if not valid:
            return 0.0, 0
        kept = logits[:valid, :-1].float()
        targets = ids[:valid, 1:]
        summed = nn.functional.cross_entropy(kept.flatten(0, 1), targets.flatten(), reduction="sum")
        return float(summed), targets.numel()

    def tokens(self, steps: int) -> int:
        """See `Task`."""
        return steps * self.shape.tokens

    def save(self, engine: DeepSpeedEngine, folder: Path) -> None:
        """Do nothing: the checkpoint has everything."""
