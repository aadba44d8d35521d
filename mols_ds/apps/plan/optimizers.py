"""Bytes of optimizer state without the fp32 weights, by the formulas of the optimizer catalog."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from mols_ds.core.groups import base_group
from mols_ds.errors import MolsUnsupportedError
from mols_ds.optim.build import NOT_MATRICES
from mols_ds.optim.catalog import NAMES, row_of
from mols_ds.optim.settings import ReadSettings


class Weight(NamedTuple):
    """A trainable parameter. group: its (first) module group."""

    name: str
    shape: tuple[int, ...]
    group: str
    active: float = 1.0
    """Share of its elements that a token uses: topk / experts for an expert, else 1."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """True for matrices inside the blocks, which Muon and similar optimizers treat separately."""
        return len(self.shape) >= 2 and base_group(self.group) not in NOT_MATRICES


def state_bytes(name: str, settings: ReadSettings, weights: Iterable[Weight]) -> int:
    """Return the state bytes of whole parameters. Raises MolsUnsupportedError for an optimizer without a formula.

    settings: those of the optimizer, and "hidden", the width of the model.
    """
    row = row_of(name)
    if row is None or row.state is None:
        known = [key for key, entry in NAMES.items() if entry.state is not None]
        raise MolsUnsupportedError(f'plan: the state of optimizer "{name}" is unknown; known are {", ".join(known)}')
    formula = row.state
    return sum(formula(weight.shape, weight.is_matrix, settings) for weight in weights)


def state_of_shard(name: str, settings: ReadSettings, weights: Iterable[Weight], elements: int) -> int:
    """Return the state bytes of `elements` elements of a flat shard, from the mean bytes per element."""
    every = list(weights)
    return round(state_bytes(name, settings, every) / sum(weight.numel for weight in every) * elements)
