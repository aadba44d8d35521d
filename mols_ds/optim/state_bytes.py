"""Bytes of optimizer state per parameter, without its fp32 weight: the formulas of the catalog's rows."""

from __future__ import annotations

import math
from collections.abc import Callable

from mols_ds.optim.settings import ReadSettings

Shape = tuple[int, ...]

StateBytes = Callable[[Shape, bool, ReadSettings], int]
"""(shape, whether it is a block matrix, settings) -> bytes.

A block matrix is a weight between features, not an embedding or output head; Muon and similar treat them separately.
Moments are fp32, as in DeepSpeed, Megatron-core and this package.
"""

QUANTILE_BLOCK = 256
"""Elements per block of bitsandbytes' 8-bit state, with one fp32 maximum each (bitsandbytes/optim/optimizer.py)."""


def per_element(size: int) -> StateBytes:
    """Formula for `size` bytes per element of any shape: 8 for two fp32 moments."""
    return lambda shape, is_matrix, settings: size * math.prod(shape)


def sgd(shape: Shape, is_matrix: bool, settings: ReadSettings) -> int:
    """One fp32 buffer if there is momentum."""
    return 4 * math.prod(shape) if settings.get("momentum", 0.0) else 0


def eight_bit(shape: Shape, is_matrix: bool, settings: ReadSettings) -> int:
    """Two 8-bit moments with an fp32 maximum per block each; fp32 moments for tensors below min_8bit_size."""
    numel = math.prod(shape)
    if numel < int(settings.get("min_8bit_size", 4096)):
        return 8 * numel
    return 2 * numel + 8 * -(-numel // QUANTILE_BLOCK)


def muon(shape: Shape, is_matrix: bool, settings: ReadSettings) -> int:
    """One momentum buffer for a matrix; Adam's two moments for the rest."""
    return (4 if is_matrix else 8) * math.prod(shape)


def soap(shape: Shape, is_matrix: bool, settings: ReadSettings) -> int:
    """Two moments; a Gram matrix and its basis for each side of a matrix up to max_precondition_dim (2409.11321)."""
    sides = [side for side in shape if side <= settings.get("max_precondition_dim", 10000)]
    return 8 * math.prod(shape) + (8 * sum(side * side for side in sides) if is_matrix else 0)


def adafactor(shape: Shape, is_matrix: bool, settings: ReadSettings) -> int:
    """Row and column means of a matrix's squares; all squares of a vector (Shazeer and Stern 2018)."""
    numel = math.prod(shape)
    if len(shape) < 2:
        return 4 * numel
    return 4 * (numel // shape[-1] + numel // shape[-2])


def low_rank(shape: Shape, is_matrix: bool, settings: ReadSettings) -> int:
    """Moments of the projected gradient, and the projection (GaLore 2403.03507, APOLLO 2412.05270).

    The setting "hidden" is the model's width; the default rank is a quarter of it.
    """
    if not is_matrix or len(shape) != 2:
        return 8 * math.prod(shape)
    rank = min(int(settings.get("rank") or max(1, settings.get("hidden", 0) // 4)), *shape)
    small, large = sorted(shape)
    return 8 * rank * large + 4 * rank * small
