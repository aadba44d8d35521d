"""Bytes of optimizer state besides the fp32 weights, by the formulas of the optimizers' catalog."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from mols_ds.core.groups import base_group
from mols_ds.errors import MolsUnsupportedError
from mols_ds.optim.catalog import NAMES, row_of
from mols_ds.optim.settings import ReadSettings


class Weight(NamedTuple):
    """A trainable parameter. group: its (first) module group. dtype_bytes is the config's, not its own."""

    name: str
    shape: tuple[int, ...]
    group: str
    active: float = 1.0
    """Share of its elements that a token uses: topk / experts of an expert, else 1."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """A map between features inside the blocks, which Muon and its kin treat apart."""
        return len(self.shape) >= 2 and base_group(self.group) not in ("embedding", "head")


def state_bytes(name: str, settings: ReadSettings, weights: Iterable[Weight]) -> int:
    """State of whole parameters. Raises MolsUnsupportedError for an optimizer whose state is not known.

    settings: the optimizer's, and "hidden", the model's width.
    """
    row = row_of(name)
    if row is None or row.state is None:
        known = [key for key, entry in NAMES.items() if entry.state is not None]
        raise MolsUnsupportedError(f'plan: the state of optimizer "{name}" is not known; known are {", ".join(known)}')
    formula = row.state
    return sum(formula(weight.shape, weight.is_matrix, settings) for weight in weights)


def state_of_shard(name: str, settings: ReadSettings, weights: Iterable[Weight], elements: int) -> int:
    """State of `elements` of a flat shard: the whole parameters' bytes an element times that many."""
    every = list(weights)
    return round(state_bytes(name, settings, every) / sum(weight.numel for weight in every) * elements)
