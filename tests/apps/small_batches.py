"""The shape of small batches, and a tokenizer with one token for each letter."""

from __future__ import annotations

from mols_ds.training.batches import BatchShape


def shape(rank: int = 0, world: int = 1, micro: int = 2, accumulation: int = 2, length: int = 4) -> BatchShape:
    return BatchShape(length, micro, accumulation, rank, world)


def letters(texts: list[str]) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]
