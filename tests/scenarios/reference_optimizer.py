"""The optimizers of the reference (float64, a multiplier per parameter), and DeepSpeed's dynamic loss scale."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BETAS, EPS, MOMENTUM = (
    (0.9, 0.95),
    1e-3,
    0.9,
)  # large eps: rounding must not decide the sign of a step
FP16_POWER, FP16_WINDOW = 8, 3


@dataclass
class State:
    """Optimizer state of one parameter."""

    m: Tensor
    v: Tensor
    steps: int = 0


@dataclass
class ReferenceOptimizer:
    """AdamW ("adamw", "custom", "fused_adam"), Adam with L2 ("adam"), SGD with momentum ("sgd").

    Args:
        weights: float64 master weights by name.
        decays: weight decay by name.
    """

    kind: str
    weights: dict[str, Tensor]
    decays: Mapping[str, float]
    states: dict[str, State] = field(default_factory=dict)

    def step(
        self,
        gradients: Mapping[str, Tensor],
        lrs: Mapping[str, float],
        rates: Mapping[str, float],
        unscaled: bool = False,
    ) -> None:
        """Update the parameters that have a gradient. The learning rate of each is lr x rate.

        Args:
            unscaled: decoupled weight decay uses lr without the rate.
        """
        for name, gradient in gradients.items():
            w, g = self.weights[name], gradient.double()
            lr, decay = lrs[name] * rates.get(name, 1.0), self.decays[name]
            if name not in self.states:
                self.states[name] = State(torch.zeros_like(w), torch.zeros_like(w))
            state = self.states[name]
            state.steps += 1
            if self.kind in ("adam", "sgd"):
                g = g + decay * w
            else:
                w.mul_(1 - (lrs[name] if unscaled else lr) * decay)
            if self.kind == "sgd":
                state.m.mul_(MOMENTUM).add_(g)
                w.sub_(lr * state.m)
                continue
            state.m.mul_(BETAS[0]).add_(g, alpha=1 - BETAS[0])
            state.v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            m, v = state.m / (1 - BETAS[0] ** state.steps), state.v / (1 - BETAS[1] ** state.steps)
            w.sub_(lr * m / (v.sqrt() + EPS))

    def moments(self) -> dict[str, tuple[Tensor, Tensor, int]]:
        """(m, v, number of updates) of each parameter."""
        found = {}
        for name, w in self.weights.items():
            state = self.states.get(name)
            found[name] = (torch.zeros_like(w), torch.zeros_like(w), 1) if state is None else (
                state.m, state.v, state.steps
            )  # fmt: skip
        return found

    def saved(self) -> Any:
        return copy.deepcopy((self.weights, self.states))

    def load(self, saved: Any) -> None:
        self.weights, self.states = copy.deepcopy(saved)


@dataclass
class Scale:
    """A loss scale: constant, or dynamic with a window of FP16_WINDOW steps."""

    dynamic: bool
    value: float = 1.0
    iteration: int = 0
    last_overflow: int = -1

    def update(self, overflow: bool) -> None:
        """Update the scale after a step or a skipped step."""
        if not self.dynamic:
            return
        if overflow:
            self.value, self.last_overflow = max(self.value / 2, 1.0), self.iteration
        else:
            stable = self.iteration - self.last_overflow - 1
            if stable > 0 and stable % FP16_WINDOW == 0:
                self.value *= 2
        self.iteration += 1

    def lower(self) -> bool:
        """Lower the scale after a sample that is not finite. Returns whether it was lowered."""
        if not self.dynamic or self.value <= 1.0:
            return False
        self.update(True)
        return True


def clip_factor(gradients: Mapping[str, Tensor], clip: float, scale: float) -> float:
    """The divisor of the gradients: the loss scale, times norm / clip if the norm is above `clip`."""
    norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients.values())) / scale
    return scale * max(1.0, (norm + 1e-6) / clip) if clip > 0 else scale
