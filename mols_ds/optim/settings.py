"""Types of optimizer settings, Adam's defaults, and the settings that are kept when the optimizer changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Settings = dict[str, Any]
"""Settings of an optimizer or of one of its parameter groups, by name."""
ReadSettings = Mapping[str, Any]
"""The same, read-only."""

ADAM: ReadSettings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
"""Defaults of arXiv 2605.05794, Appendix B, for an optimizer with Adam's moments."""
CARRIED = ("lr", "betas", "eps", "weight_decay")
"""Settings to keep, if the new optimizer has them, when only the name changes."""
DROPPED = ("torch_adam", "adam_w_mode", "fp32_optimizer_states", "foreach", "fused")
"""Settings of DeepSpeed's and torch's Adam that choose a kernel; other optimizers ignore them."""
