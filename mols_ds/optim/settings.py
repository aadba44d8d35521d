"""Settings of an optimizer: their types, Adam's defaults, and what another optimizer keeps of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
