"""Training on answers: the loss of a micro-batch, the held-out loss, and extra files of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mols_ds.apps.finetune.data import IGNORED, AnswerBatch, AnswerBatches
from mols_ds.apps.finetune.model import save_weights

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedTokenizerBase


class Answers:
    """A `Task` whose loss is the mean over all answer tokens of the global batch.

    DeepSpeed averages the losses of micro-batches, which would give tokens of short answers more weight. So a
    micro-batch's loss is the *sum* over its answer tokens times passes x ranks / (answer tokens of the global batch).
    The logged loss is the same mean.
    """

    def __init__(
        self, batches: AnswerBatches, tokenizer: PreTrainedTokenizerBase, adapters: bool, identity: Mapping[str, object]
    ) -> None:
        self.batches, self.tokenizer = batches, tokenizer
        self.partial = self.adapters = adapters
        self.identity = identity

    def loss(self, engine: DeepSpeedEngine, batch: AnswerBatch) -> Tensor:
        """See `Task`: float32, on the engine's device."""
        return _summed(engine, batch, len(batch.ids)) * batch.weight

    def held_out(self, engine: DeepSpeedEngine, batch: AnswerBatch, valid: int) -> tuple[float, int]:
        """See `Task`."""
        summed = _summed(engine, batch, valid)
        return float(summed), int((batch.labels[:valid, 1:] != IGNORED).sum())

    def tokens(self, steps: int) -> int:
        """See `Task`: tokens of the examples, with prompts, without padding."""
        return self.batches.tokens(steps)

    def save(self, engine: DeepSpeedEngine, folder: Path) -> None:
        """Write adapters to folder/adapter, or the whole model to folder/model, with the tokenizer."""
        save_weights(engine, folder, self.tokenizer, adapters=self.adapters)


def _summed(engine: DeepSpeedEngine, batch: AnswerBatch, valid: int) -> Tensor:
    """Return the cross-entropy summed over the labels of the first `valid` rows. Every rank runs the model."""
    device = engine.device
    logits = engine(input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device), use_cache=False).logits
    labels = batch.labels[:valid, 1:].to(device)
    kept = labels != IGNORED
    return nn.functional.cross_entropy(logits[:valid, :-1][kept].float(), labels[kept], reduction="sum")
