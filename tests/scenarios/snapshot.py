"""The state of a run after an action, as a user can read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Snapshot:
    """The state of a run after an action: expected (from the reference) or actual (from one rank of an engine).

    The reference has one entry per rank in random, buffers and eval_losses; a rank has only its own.

    Args:
        random: digest of torch's random state.
        buffers: buffers of the model by name.
        weights: fp32 weights by name, on rank 0 only; empty for Megatron-core.
        warnings: the warnings of the action. Parts of the messages (reference), or whole messages (engine).
        extra_micro_steps: DeepSpeed's `micro_steps` minus the expected number.
        parts: for Megatron-core, this rank's parts of the weights by name.
    """

    steps: int
    skipped: int
    lrs: list[float]
    scale: float
    random: list[str]
    buffers: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    phase: str = "off"
    samples: int = 0
    alphas: dict[str, float] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    warnings: list[list[str]] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)
    extra_micro_steps: int = 0
    error: str = ""
    parts: dict[str, Any] = field(default_factory=dict)
