"""What a micro-batch is and what is trained on it. `NextTokens` is pre-training; `finetune.task` trains on answers."""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from mols_ds.training.batches import BatchShape


class Task(Protocol):
    """What the training loop leaves open. Every method is called on all ranks at the same point."""

    partial: bool
    """Whether the checkpoints leave frozen weights out, which are loaded from elsewhere."""
    identity: dict[str, Any]
    """Arguments by name that a checkpoint must have been made with to be resumed."""

    def loss(self, engine: Any, batch: Any) -> Tensor:
        """A micro-batch's loss. What a step descends is its mean over the step's micro-batches and ranks."""
        ...

    def held_out(self, engine: Any, batch: Any, valid: int) -> tuple[float, int]:
        """(sum of the losses, tokens that have one) over the first `valid` sequences of a held-out micro-batch."""
        ...

    def tokens(self, steps: int) -> int:
        """Tokens that `steps` steps have trained on."""
        ...

    def save(self, engine: Any, folder: Path) -> None:
        """Writes what is wanted beside a checkpoint."""
        ...


class NextTokens:
    """Every token of packed sequences from those before it. A batch is int64 of shape (micro, length)."""

    partial = False

    def __init__(self, shape: BatchShape) -> None:
        self.shape = shape
        self.identity: dict[str, Any] = {}

    def loss(self, engine: Any, batch: Tensor) -> Tensor:
        """See `Task`: the mean over the micro-batch's tokens, which all micro-batches have equally many of."""
        ids = batch.to(engine.device)
        loss: Tensor = engine(input_ids=ids, labels=ids).loss
        return loss

    def held_out(self, engine: Any, batch: Tensor, valid: int) -> tuple[float, int]:
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

    def save(self, engine: Any, folder: Path) -> None:
        """Nothing: the checkpoint holds all."""
