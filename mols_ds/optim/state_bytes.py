"""Bytes of optimizer state of one parameter, besides its fp32 weight: the formulas that the catalog's rows name."""

from __future__ import annotations

import math
from collections.abc import Callable

from mols_ds.optim.settings import ReadSettings

Shape = tuple[int, ...]

StateBytes = Callable[[Shape, bool, ReadSettings], int]
"""(shape, whether it is a matrix of the blocks, settings) -> bytes.

A matrix of the blocks is a weight between features, not an embedding or output head: Muon and its kin treat these
apart. Moments are fp32, as DeepSpeed, Megatron-core and this package keep them.
"""

QUANTILE_BLOCK = 256
"""Elements in a block of bitsandbytes' 8-bit state, with one fp32 maximum a block (bitsandbytes/optim/optimizer.py)."""


def per_element(size: int) -> StateBytes:
    """The formula of an optimizer that keeps `size` bytes an element whatever the shape: 8 for two fp32 moments."""
    return lambda shape, is_matrix, settings: size * math.prod(shape)


def sgd(shape: Shape, is_matrix: bool, settings: ReadSettings) -> int:
    """One fp32 buffer, with momentum only."""
    return 4 * math.prod(shape) if settings.get("momentum", 0.0) else 0


def eight_bit(shape: Shape, is_matrix: bool, settings: ReadSettings) -> int:
    """Two 8-bit moments with an fp32 maximum a block each; tensors below min_8bit_size keep fp32 moments."""
    numel = math.prod(shape)
    if numel < int(settings.get("min_8bit_size", 4096)):
        return 8 * numel
    return 2 * numel + 8 * -(-numel // QUANTILE_BLOCK)


def muon(shape: Shape, is_matrix: bool, settings: ReadSettings) -> int:
    """One momentum buffer of a matrix; Adam's two moments of the rest."""
    return (4 if is_matrix else 8) * math.prod(shape)


def soap(shape: Shape, is_matrix: bool, settings: ReadSettings) -> int:
    """Two moments; a Gram matrix and its basis for each side of a matrix up to max_precondition_dim (2409.11321)."""
    sides = [side for side in shape if side <= settings.get("max_precondition_dim", 10000)]
    return 8 * math.prod(shape) + (8 * sum(side * side for side in sides) if is_matrix else 0)


def adafactor(shape: Shape, is_matrix: bool, settings: ReadSettings) -> int:
    """Row and column means of a matrix's squares, all squares of a vector (Shazeer and Stern 2018)."""
    numel = math.prod(shape)
    if len(shape) < 2:
        return 4 * numel
    return 4 * (numel // shape[-1] + numel // shape[-2])


def low_rank(shape: Shape, is_matrix: bool, settings: ReadSettings) -> int:
    """Moments of the projected gradient, and the projection (GaLore 2403.03507, APOLLO 2412.05270).

    The setting "hidden" is the model's width, of which a quarter is the rank where none is given.
    """
    if not is_matrix or len(shape) != 2:
        return 8 * math.prod(shape)
    rank = min(int(settings.get("rank") or max(1, settings.get("hidden", 0) // 4)), *shape)
    small, large = sorted(shape)
    return 8 * rank * large + 4 * rank * small


def adam_mini(shape: Shape, is_matrix: bool, settings: ReadSettings) -> int:
    """The first moment; the second is a number a block (2406.16793), which is left out."""
    return 4 * math.prod(shape)
