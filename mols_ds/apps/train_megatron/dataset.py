"""Samples of each step's batch from Megatron's indexed data sets.

`mols_ds.training.tokens` writes them (same text, tokenizer and held-out documents as train.py, which reads the same
files). Megatron's GPTDataset splits and shuffles them, its BlendedDataset mixes them. The step number addresses a
batch, so a resumed run continues at the exact sample and the probe stream shifts nothing.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mols_ds.core.json_types import JsonObject
from mols_ds.errors import MolsConfigError
from mols_ds.training.batches import BatchShape, Stream, held_out_batches
from mols_ds.training.sources import DataSpec, one_line
from mols_ds.training.token_files import Tokens
from mols_ds.training.tokens import Tokenizer, prepare

PROBE_SEED = 7919
"""Seed offset of the probe stream, for another order."""

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Vocabulary:
    """The part of a tokenizer that GPTDataset needs."""

    eod: int
    vocab_size: int
    unique_identifiers: dict[str, str]


@dataclass(frozen=True)
class Text:
    """Text of a run: paths and weights of its indexed data sets, held-out tokens, and tokenizer."""

    prefixes: Sequence[str]
    weights: Sequence[float]
    cache: str
    held_out: Tokens
    tokenizer: Tokenizer
    digests: JsonObject = field(default_factory=dict)

    @property
    def vocabulary(self) -> Vocabulary:
        tokenizer = self.tokenizer
        return Vocabulary(tokenizer.end, tokenizer.size, {"tokenizer": tokenizer.identity})


def refuse_streamed(spec: DataSpec) -> None:
    """Raise MolsConfigError for a streamed source: an indexed data set is a file."""
    if spec.streaming:
        raise MolsConfigError(
            f"data.source: {spec.source} is a data set of the hub, which is streamed; Megatron's indexed data set "
            "needs text on disk: download it as text, JSONL or parquet and name that folder"
        )


def prepare_text(
    spec: DataSpec, cache: Path, *, tokenizer: Path | None, vocab_size: int, seed: int, held_out_tokens: int
) -> Text:
    """Return the tokens of a source and the indexed data set of its training part. Builds what the cache lacks.

    Every process of a job may call this at the same time.

    Raises:
        MolsConfigError: a streamed source; an indexed data set is a file.
    """
    refuse_streamed(spec)
    loaded, tokens = prepare(
        spec, cache, tokenizer=tokenizer, vocab_size=vocab_size, seed=seed, held_out_tokens=held_out_tokens
    )
    if not all(len(part) for part in tokens.train):
        raise MolsConfigError(f"data.source: {spec.source} has no text to train on")
    samples = Path(tokens.prefixes[0]).with_name("samples")
    return Text(tokens.prefixes, tokens.weights, str(samples), tokens.held_out, loaded, tokens.digests)


class IndexedBatches:
    """Batches of Megatron's GPTDataset.

    Create it on every rank at the same time: rank 0 writes the sample indices, the others wait and read them.

    Args:
        shape: `rank` and `world` are data-parallel.
        steps: updates of the run.
        probes: additional batches that a calibration may measure.
    """

    def __init__(self, text: Text, shape: BatchShape, *, steps: int, probes: int, seed: int) -> None:
        self._shape = shape
        self._sets = {"train": _gpt_dataset(text, shape, steps, seed)}
        if probes:
            self._sets["probe"] = _gpt_dataset(text, shape, probes, seed + PROBE_SEED)

    @property
    def epochs(self) -> int:
        """Passes over the text, of a mixture the most over one source. Megatron shuffles the samples of all of them
        together: with more than one, their order depends on the number of steps."""
        train = self._sets["train"]
        return max(len(part.document_index) // len(part.indices) for part in getattr(train, "datasets", [train]))

    def step(self, stream: Stream, step: int) -> Iterator[Batch]:
        """Yield this rank's micro-batches of global batch `step`: "tokens" and "labels" int64, "loss_mask" float32,
        each of shape (micro, length), and "position_ids".
        """
        shape, data = self._shape, self._sets[stream]
        for pass_ in range(shape.accumulation):
            start = step * shape.sequences + (pass_ * shape.world + shape.rank) * shape.micro
            # A calibration may be repeated ("recalibrate") or extended by skipped samples: then start again
            rows = [data[index % len(data)] for index in range(start, start + shape.micro)]
            yield {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key != "dataset_id"}


def _gpt_dataset(text: Text, shape: BatchShape, steps: int, seed: int) -> Any:
    """Build Megatron-core's GPTDataset with the samples of `steps` global batches, over as many epochs as needed."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    logging.getLogger("megatron.core.datasets").setLevel(logging.WARNING)
    mixed = len(text.prefixes) > 1
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=shape.length,
        blend=(list(text.prefixes), list(text.weights) if mixed else None),
        split="1,0,0",  # a hash selects held-out documents, not their position in the file
        path_to_cache=text.cache,
        tokenizer=text.vocabulary,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [steps * shape.sequences, *([0, 0] if mixed else [None, None])]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train, *_ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    except (OSError, ValueError, AssertionError, IndexError) as error:
        raise MolsConfigError(f"data: Megatron's data set cannot be built from it: {one_line(error)}") from error
    if train is None or not len(train):
        raise MolsConfigError("data: the training text is shorter than one sequence: give more of it")
    return train


def evaluation_batches(text: Text, shape: BatchShape, limit: int, multiple: int) -> list[Batch]:
    """Return the held-out micro-batches of this data-parallel rank, with the same targets as train.py.

    Each sequence predicts its own tokens 2 to `length`; the last position has no target and is masked. Batches that
    fill up to a multiple of `multiple` (interleaved stages need that) count nothing.
    """
    batches: list[Batch] = []
    for ids, valid in held_out_batches(text.held_out, shape, limit):
        mask = torch.zeros(ids.shape, dtype=torch.float32)
        mask[:valid, :-1] = 1.0
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        batches.append({"tokens": ids, "labels": ids.roll(-1, 1), "loss_mask": mask, "position_ids": positions})
    while len(batches) % multiple:
        batches.append({**batches[-1], "loss_mask": torch.zeros_like(batches[-1]["loss_mask"])})
    return batches
