"""Tokenize examples, mark the answer tokens to train on, and build batches.

Every process has all examples. So each can compute the number of answer tokens in a step's global batch without
communication; the loss is divided by it (`AnswerBatch.weight`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mols_ds.apps.finetune.examples import Example, read_examples
from mols_ds.apps.finetune.template import Template, TextPart, text_parts
from mols_ds.errors import MolsConfigError
from mols_ds.training.batches import STREAMS, BatchShape, SequenceOrder, Stream
from mols_ds.training.sources import DataSpec, document_hash, local_threshold, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token without a loss: torch's `ignore_index`."""
CHUNK = 1000
"""Examples per tokenizer call."""


@dataclass(frozen=True)
class Tokenized:
    """Concatenated examples: `ids` int64 and `answers` bool of shape (tokens,), `starts` int64 of shape (examples +
    1,). `cut` examples were longer than the cut-off; `dropped` examples have no answer token within it."""

    ids: npt.NDArray[np.int64]
    answers: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]
    cut: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, shape (examples,)."""
        return np.diff(self.starts)

    @cached_property
    def targets(self) -> npt.NDArray[np.int64]:
        """Predicted answer tokens of each example (those with a token before them), shape (examples,)."""
        counted = self.answers.copy()
        counted[self.starts[:-1]] = False
        return np.add.reduceat(counted.astype(np.int64), self.starts[:-1])

    @cached_property
    def digest(self) -> str:
        """16 hex digits that change with any token, mark or boundary."""
        hashed = hashlib.blake2b(digest_size=8)
        for part in (self.ids, self.answers, self.starts):
            hashed.update(part.tobytes())
        return hashed.hexdigest()


@dataclass(frozen=True, slots=True)
class AnswerBatch:
    """A micro-batch, right-padded to its longest example: `ids`, `mask` (1: not padding) and `labels` (IGNORED on
    prompts and padding), int64 of shape (micro, length). Its loss is `weight` times the sum over its labels."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    weight: float


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the transformers tokenizer of a folder or hub name. Raises MolsConfigError if there is none, or if it has no
    end-of-text token for the end of an answer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more for a broken folder
        raise MolsConfigError(f"tokenizer {source}: cannot be loaded: {one_line(error)} (see --tokenizer)") from error
    if tokenizer.eos_token_id is None:
        raise MolsConfigError(f"tokenizer {source}: it has no end-of-text token to end an answer with")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prepare(
    spec: DataSpec,
    held_out: DataSpec | None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    cutoff: int,
    seed: int,
) -> tuple[Tokenized, Tokenized]:
    """Return (training examples, held-out examples) of one or two sources. The split depends on `seed` and the text
    alone, and equal examples are on the same side. Raises MolsConfigError if a side is empty."""
    if template == "chat" and not tokenizer.chat_template:
        raise MolsConfigError("--template chat: the tokenizer has no chat template; use plain, or auto")
    examples = read_examples(spec)
    if held_out is not None:
        sides = examples, read_examples(held_out)
    else:
        texts = ["\0".join([example.input, *(m.content for m in example.messages)]) for example in examples]
        threshold = local_threshold(texts, spec.eval_share, seed)
        chosen = [document_hash(text, seed) < threshold for text in texts]
        sides = (
            [example for example, out in zip(examples, chosen, strict=True) if not out],
            [example for example, out in zip(examples, chosen, strict=True) if out],
        )
    tokenized = [tokenize(side, tokenizer, template, cutoff) for side in sides]
    for name, side in zip(("training", "held-out"), tokenized, strict=True):
        if not len(side):
            raise MolsConfigError(
                f"data {spec.source}: no {name} example has an answer within --cutoff {cutoff} tokens; raise it"
            )
    return tokenized[0], tokenized[1]


def tokenize(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: Template, cutoff: int
) -> Tokenized:
    """Tokenize all examples, at most `cutoff` tokens each. Prompt and answer are tokenized separately, as the prompt is
    at inference: no token spans both. Plain texts start with the tokenizer's begin tokens; chat templates write their
    own."""
    before = _before_text(tokenizer)
    ids: list[npt.NDArray[np.int64]] = []
    answers: list[npt.NDArray[np.bool_]] = []
    cut = dropped = 0
    source = iter(examples)
    while chunk := list(islice(source, CHUNK)):
        texts = [text_parts(example, template, tokenizer) for example in chunk]
        flat = [part.text for parts in texts for part in parts]
        encoded = iter(tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"])
        for parts in texts:
            mine, marks = _join(parts, encoded, before if any(part.ends for part in parts) else [], tokenizer)
            cut += len(mine) > cutoff
            mine, marks = mine[:cutoff], marks[:cutoff]
            if not marks[1:].any():
                dropped += 1
                continue
            ids.append(mine)
            answers.append(marks)
    starts = np.cumsum([0, *(len(mine) for mine in ids)], dtype=np.int64)
    empty = np.zeros(0, np.int64)
    return Tokenized(
        np.concatenate([empty, *ids]), np.concatenate([empty.astype(bool), *answers]), starts, cut, dropped
    )


def _before_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that a tokenizer adds before every text."""
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    return []


def _join(
    parts: Sequence[TextPart], encoded: Iterator[list[int]], before: list[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return (ids, whether each is part of an answer) of one example."""
    ids = list(before)
    marks = [False] * len(before)
    for part in parts:
        more = [*next(encoded), *([tokenizer.eos_token_id] if part.ends else [])]
        ids += more
        marks += [part.answer] * len(more)
    return np.asarray(ids, np.int64), np.asarray(marks, np.bool_)


class AnswerBatches:
    """Global batches of examples in a new order every epoch. The step is the position: there is no state to save, and
    the examples of a step do not depend on the number of ranks."""

    def __init__(self, data: Tokenized, shape: BatchShape, seed: int, pad: int) -> None:
        self._data, self._shape, self._pad = data, shape, pad
        self._orders = {stream: SequenceOrder(len(data), seed, stream) for stream in STREAMS}
        self._trained: list[int] = [0]

    def indices(self, stream: Stream, step: int) -> npt.NDArray[np.int64]:
        """Examples of a global batch; rank r's micro-batch p is its (p x world + r)-th part."""
        return self._orders[stream].indices(step * self._shape.sequences, self._shape.sequences)

    def step(self, stream: Stream, step: int) -> Iterator[AnswerBatch]:
        """Yield this rank's micro-batches of global batch `step`. Their weights make the mean of the losses over passes
        and ranks, which DeepSpeed computes, the mean over all answer tokens of the global batch."""
        shape = self._shape
        chosen = self.indices(stream, step)
        weight = shape.accumulation * shape.world / float(self._data.targets[chosen].sum())
        for pass_ in range(shape.accumulation):
            start = (pass_ * shape.world + shape.rank) * shape.micro
            yield collate(self._data, chosen[start : start + shape.micro], self._pad, weight)

    def tokens(self, steps: int) -> int:
        """Tokens of the first `steps` global batches of the training stream, with prompts, without padding."""
        while len(self._trained) <= steps:
            seen = self._data.lengths[self.indices("train", len(self._trained) - 1)].sum()
            self._trained.append(self._trained[-1] + int(seen))
        return self._trained[steps]


def collate(data: Tokenized, chosen: npt.NDArray[np.int64], pad: int, weight: float) -> AnswerBatch:
    """Batch the chosen examples, padded to the longest."""
    length = int(data.lengths[chosen].max())
    ids = np.full((len(chosen), length), pad, np.int64)
    mask = np.zeros_like(ids)
    labels = np.full_like(ids, IGNORED)
    for row, index in enumerate(chosen):
        start, end = data.starts[index], data.starts[index + 1]
        mine = slice(0, int(end - start))
        ids[row, mine], mask[row, mine] = data.ids[start:end], 1
        labels[row, mine] = np.where(data.answers[start:end], data.ids[start:end], IGNORED)
    return AnswerBatch(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels), weight)


def held_out_batches(data: Tokenized, shape: BatchShape, limit: int, pad: int) -> list[tuple[AnswerBatch, int]]:
    """Return this rank's micro-batches of the first `limit` held-out examples, with the number of valid examples in
    each. Every rank gets the same number of batches: the last example is repeated with count 0 to fill up."""
    count = min(len(data), limit)
    batches = []
    for first in range(0, count, shape.micro * shape.world):
        start = first + shape.rank * shape.micro
        indices = np.arange(start, start + shape.micro, dtype=np.int64)
        valid = int(np.clip(count - start, 0, shape.micro))
        batches.append((collate(data, np.minimum(indices, count - 1), pad, 1.0), valid))
    return batches
