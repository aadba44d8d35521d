"""Adam-mini, slow and plain: numpy, whole parameters, the block of every element written out.

For LLaMA and GPT-2 of tests/helpers/oracle/models.py. Source: arXiv 2406.16793, algorithms 2 and 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tests.helpers.oracle.sizes import HEADS, HIDDEN

HEAD = HIDDEN // HEADS
"""Features of one head."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Of Adam-mini and SGG; matrices and vectors in two parameter groups, as the engines of the tests have them."""

    lr: float
    vector_lr: float
    decay: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-4

    def rate(self, p: Tensor) -> float:
        return self.lr if p.ndim >= 2 else self.vector_lr

    def decay_of(self, p: Tensor) -> float:
        return self.decay if p.ndim >= 2 else 0.0


def block_of_each(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The block of every element, in the parameter's shape."""
    if name.endswith("bias"):
        return np.arange(shape[0])
    if len(shape) == 1:
        return np.zeros(shape, dtype=int)
    rows, columns = np.indices(shape)
    if "q_proj" in name or "k_proj" in name:
        return rows // HEAD
    if name.endswith("attn.c_attn.weight"):  # (in, out), columns q | k | v
        return np.where(columns < 2 * HIDDEN, columns // HEAD, 2 * HEADS + columns - 2 * HIDDEN)
    if ".c_proj." in name or ".c_fc." in name:
        return columns
    return rows


class SlowAdamMini:
    """The state of one run over the parameters of `model`, which `step` updates."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.settings, self.steps = model, settings, 0
        self.m = {name: np.zeros(p.shape) for name, p in model.named_parameters()}
        self.blocks = {name: block_of_each(name, tuple(p.shape)) for name, p in model.named_parameters()}
        self.v = {name: np.zeros(int(blocks.max()) + 1) for name, blocks in self.blocks.items()}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor]) -> None:
        s = self.settings
        self.steps += 1
        for name, p in self.model.named_parameters():
            g, blocks = gradients[name].double().numpy(), self.blocks[name]
            means = np.array([np.mean(g[blocks == b] ** 2) for b in range(len(self.v[name]))])
            self.m[name] = s.beta1 * self.m[name] + (1 - s.beta1) * g
            self.v[name] = s.beta2 * self.v[name] + (1 - s.beta2) * means
            m_hat = self.m[name] / (1 - s.beta1**self.steps)
            v_hat = (self.v[name] / (1 - s.beta2**self.steps))[blocks]
            w = p.double().numpy() * (1 - s.rate(p) * s.decay_of(p))
            p.copy_(torch.from_numpy(w - s.rate(p) * m_hat / (np.sqrt(v_hat) + s.eps)))
