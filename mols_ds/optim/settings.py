"""Settings of an optimizer: their types, Adam's defaults, and the ranges that all optimizers share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mols_ds.errors import MolsConfigError

Settings = dict[str, Any]
"""Settings of an optimizer or of one of its parameter groups, by name."""
ReadSettings = Mapping[str, Any]
"""The same, not to be changed."""
Section = Mapping[str, Any]
"""A DeepSpeed config, or a section of one, as JSON has it."""
EditedSection = dict[str, Any]
"""The same, to be changed in place."""

ADAM: ReadSettings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
"""Defaults of arXiv 2605.05794, Appendix B, for an optimizer with Adam's two moments."""
CARRIED = ("lr", "betas", "eps", "weight_decay")
"""Settings of another optimizer that one keeps, where it has them, when only the name is changed."""
DROPPED = ("torch_adam", "adam_w_mode", "fp32_optimizer_states", "foreach", "fused")
"""Settings of DeepSpeed's and torch's Adam that choose a kernel and mean nothing to another optimizer."""


def check_ranges(name: str, settings: ReadSettings) -> None:
    """Raise MolsConfigError for an lr, eps, weight_decay or beta out of range. name: of the optimizer."""
    for key in ("lr", "eps", "weight_decay"):
        value = settings.get(key, 0.0)
        if not _is_number(value) or not 0.0 <= value < math.inf:
            raise MolsConfigError(f'"optimizer.params.{key}" of {name} is {value!r}: give a number >= 0')
    betas = settings.get("betas", ())
    pair = isinstance(betas, tuple) and len(betas) == 2
    if "betas" in settings and not (pair and all(_is_number(b) and 0.0 <= b < 1.0 for b in betas)):
        raise MolsConfigError(f'"optimizer.params.betas" of {name} is {betas!r}: give two numbers in [0, 1)')


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
