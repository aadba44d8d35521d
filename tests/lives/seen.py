"""What is seen of a run after an action."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Seen:
    """What is to be seen after an action, of the twin or of the engine.

    random, buffers, evaluated: one for each rank. said: warnings in short (the twin), whole (the engine).
    parts: in the place of weights, a rank's parts of them (Megatron).
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
    said: list[list[str]] = field(default_factory=list)
    evaluated: list[float] = field(default_factory=list)
    extra_micros: int = 0
    error: str = ""
    parts: dict[str, Any] = field(default_factory=dict)
