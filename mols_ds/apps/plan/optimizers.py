"""Bytes of optimizer state besides the fp32 weights, for each optimizer that a config can name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from mols_ds.core.groups import base_group
from mols_ds.core.json_types import JsonMapping
from mols_ds.errors import MolsUnsupportedError

QUANTILE_BLOCK = 256
"""Elements a block of bitsandbytes' 8-bit state, each with an fp32 maximum (bitsandbytes/optim/optimizer.py)."""


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


State = Callable[[Weight, JsonMapping], int]
"""Bytes of state of one parameter (or of a shard of it, where `per_element` holds)."""


def _flat(size: float) -> State:
    return lambda weight, settings: int(size * weight.numel)


def _sgd(weight: Weight, settings: JsonMapping) -> int:
    return 4 * weight.numel if settings.get("momentum", 0.0) else 0


def _eight_bit(weight: Weight, settings: JsonMapping) -> int:
    """Two 8-bit moments with a maximum a block; small tensors keep fp32."""
    if weight.numel < int(settings.get("min_8bit_size", 4096)):
        return 8 * weight.numel
    return 2 * weight.numel + 8 * -(-weight.numel // QUANTILE_BLOCK)


def _muon(weight: Weight, settings: JsonMapping) -> int:
    return (4 if weight.is_matrix else 8) * weight.numel


def _soap(weight: Weight, settings: JsonMapping) -> int:
    """Two moments; a Gram matrix and its basis for each side of a matrix up to max_precondition_dim (2409.11321)."""
    sides = [side for side in weight.shape if side <= settings.get("max_precondition_dim", 10000)]
    return 8 * weight.numel + (8 * sum(side * side for side in sides) if weight.is_matrix else 0)


def _adafactor(weight: Weight, settings: JsonMapping) -> int:
    """Row and column means of a matrix's squares, all squares of a vector (Shazeer and Stern 2018)."""
    if len(weight.shape) < 2:
        return 4 * weight.numel
    return 4 * (weight.numel // weight.shape[-1] + weight.numel // weight.shape[-2])


def _low_rank(weight: Weight, settings: JsonMapping) -> int:
    """Moments of the projected gradient and the projection (GaLore 2403.03507, APOLLO 2412.05270)."""
    if not weight.is_matrix or len(weight.shape) != 2:
        return 8 * weight.numel
    rank = min(int(settings.get("rank") or max(1, settings.get("hidden", 0) // 4)), *weight.shape)
    small, large = sorted(weight.shape)
    return 8 * rank * large + 4 * rank * small


def _adam_mini(weight: Weight, settings: JsonMapping) -> int:
    """One moment; the other is a number a block (2406.16793), which is left out."""
    return 4 * weight.numel


STATES: dict[str, State] = {
    "adam": _flat(8),
    "adamw": _flat(8),
    "nadam": _flat(8),
    "radam": _flat(8),
    "adamax": _flat(8),
    "lion": _flat(4),
    "adagrad": _flat(4),
    "rmsprop": _flat(4),
    "sgd": _sgd,
    "lamb": _flat(8),
    "adam8bit": _eight_bit,
    "adamw8bit": _eight_bit,
    "8bitadam": _eight_bit,
    "adammini": _adam_mini,
    "sgg": _flat(8),
    "muon": _muon,
    "soap": _soap,
    "adafactor": _adafactor,
    "galore": _low_rank,
    "apollo": _low_rank,
    "sgdsai": _flat(4),
}
"""Name without case, "-" and "_" -> state. fp32 moments, as DeepSpeed's, Megatron's and this package's are."""


def plain(name: str) -> str:
    """The key of an optimizer's name in STATES."""
    return name.lower().replace("-", "").replace("_", "")


def state_bytes(name: str, settings: JsonMapping, weights: Iterable[Weight]) -> int:
    """State of whole parameters. Raises MolsUnsupportedError for an optimizer whose state is not known."""
    key = plain(name)
    if key not in STATES:
        raise MolsUnsupportedError(f'plan: the state of optimizer "{name}" is not known; known are {", ".join(STATES)}')
    return sum(STATES[key](weight, settings) for weight in weights)


def state_of_shard(name: str, settings: JsonMapping, weights: Iterable[Weight], elements: int) -> int:
    """State of `elements` of a flat shard: the whole parameters' bytes an element times that many."""
    every = list(weights)
    return round(state_bytes(name, settings, every) / sum(weight.numel for weight in every) * elements)
