"""AdamW in plain PyTorch: a rate per element, decoupled weight decay, clipping by the global norm.

w <- w - lr_i * wd * w - lr_i * m_hat / (sqrt(v_hat) + eps)        (Loshchilov & Hutter 2019, lr_i per element)

The decay may be that of the base rate instead: w <- w - lr * wd * w - ...
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.helpers.oracle.sizes import GROUPS

CLIP_EPSILON = 1e-6  # DeepSpeed and torch both divide by norm + 1e-6


@dataclass(frozen=True, slots=True)
class AdamSettings:
    lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # of weights with two dimensions or more
    vector_lr_factor: float = 1.0  # base rate of the 1-D parameters relative to `lr`
    clip: float = 0.0  # 0: no clipping
    scaled_decay: bool = True  # whether multipliers act on the decay too


class ElementwiseAdamW:
    """The state of one run; float32 like the engine's masters."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor], settings: AdamSettings) -> None:
        self.model, self.masks, self.settings, self.steps = model, masks, settings, 0
        self.m = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.v = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.norm = math.nan

    @torch.no_grad()
    def step(
        self, gradients: Mapping[str, Tensor], schedule: float = 1.0, multipliers: Mapping[str, float] | None = None
    ) -> None:
        """One update; `schedule` is the scheduler's factor on every base rate, `multipliers` group -> factor."""
        s = self.settings
        self.steps += 1
        factors = torch.tensor([(multipliers or {}).get(group, 1.0) for group in GROUPS], dtype=torch.float64)
        self.norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients.values()))
        clip = min(1.0, s.clip / (self.norm + CLIP_EPSILON)) if s.clip else 1.0
        for name, w in self.model.named_parameters():
            base = s.lr * schedule * (1.0 if w.ndim >= 2 else s.vector_lr_factor)
            decay = s.weight_decay if w.ndim >= 2 else 0.0
            rate = (base * factors[self.masks[name]]).to(w.dtype)
            g, m, v = gradients[name] * clip, self.m[name], self.v[name]
            m.copy_(s.beta1 * m + (1 - s.beta1) * g)
            v.copy_(s.beta2 * v + (1 - s.beta2) * g * g)
            m_hat, v_hat = m / (1 - s.beta1**self.steps), v / (1 - s.beta2**self.steps)
            decaying = rate if s.scaled_decay else torch.full_like(rate, base)
            w.copy_(w - decaying * decay * w - rate * m_hat / (v_hat.sqrt() + s.eps))


def ramp(t: int, begin: int, end: int, shape: str) -> float:
    """f(t): 0 at the end of the calibration, 1 at the end of the warm-up; t is the 0-based index of the step."""
    x = min(max((t - begin) / (end - begin), 0.0), 1.0)
    return x if shape == "linear" else (1 - math.cos(math.pi * x)) / 2


def multipliers(alphas: Mapping[str, float], f: float) -> dict[str, float]:
    """lr_m(t) / lr(t) = 1 + (alpha_m - 1) f(t)."""
    return {group: 1 + (alpha - 1) * f for group, alpha in alphas.items()}
