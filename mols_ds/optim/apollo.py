"""APOLLO (arXiv 2412.05270): scale each channel of the gradient like Adam does in a random low-rank space.

Written from the paper's Algorithm 1. pytorch-optimizer's class of that name scales the projected gradient and projects
it back, which is another update. The authors' package is for non-commercial use only. Where the paper is silent, this
follows GaLore (arXiv 2403.03507), its basis: project the smaller side of the matrix, put Adam's bias correction into
the step size, apply decoupled weight decay first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from mols_ds.errors import MolsConfigError, MolsUnsupportedError
from mols_ds.optim.limits import check_options
from mols_ds.optim.settings import Settings
from mols_ds.optim.sharded import loss_of

ScaleType = Literal["channel", "tensor"]
GROWTH_LIMIT = 1.01
"""gamma of the norm-growth limiter (paper, section 4.3, from Fira, arXiv 2410.01623)."""
NORM_EPS = 1e-8


def projection(shape: tuple[int, int], rank: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return P of shape (rank, smaller side) with entries N(0, 1/rank): E[P^T P] = 1 (Algorithm 1, line 3).

    Draws on the CPU from `seed`, so that every rank and device gets the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(rank, min(shape), generator=generator, dtype=torch.float32, device="cpu")
    return (numbers / math.sqrt(rank)).to(device=device, dtype=dtype)


def project(gradient: Tensor, matrix: Tensor) -> Tensor:
    """Return R, (rank, larger side). gradient: (m, n); P contracts the smaller side, or the columns of a square one."""
    return matrix @ (gradient if gradient.shape[0] < gradient.shape[1] else gradient.T)


def scaling(projected: Tensor, adam: Tensor, kind: ScaleType) -> Tensor:
    """Return s_j = ||R~_{:,j}|| / ||R_{:,j}|| per channel j of the larger side, or one number (eq. 5, 7)."""
    over = None if kind == "tensor" else 0
    after: Tensor = torch.linalg.vector_norm(adam, dim=over)
    before: Tensor = torch.linalg.vector_norm(projected, dim=over)
    return after / (before + NORM_EPS)


def limit_growth(update: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (update, its norm), with the norm limited to `GROWTH_LIMIT` times the previous one."""
    norm = torch.linalg.vector_norm(update)
    if previous is None:
        return update, norm
    factor = torch.clamp(norm / (previous + NORM_EPS), min=GROWTH_LIMIT) / GROWTH_LIMIT
    return update / factor, norm / factor


class Apollo(Optimizer):
    """APOLLO on the 2-D tensors of parameter groups with a "rank"; Adam with decoupled weight decay elsewhere.

    Keys of a group with a rank: rank, update_proj_gap (steps between new projections), scale (the paper's alpha;
    APOLLO-Mini: rank 1, "tensor", sqrt(128)), scale_type. State of a matrix (m, n): two moments of (rank, max(m, n)),
    and P. The step is proportional to lr.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        """Raises ValueError for a rate, beta or eps out of range, or for a group with wrong keys."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: Settings) -> None:
        """As torch's. Raises MolsConfigError for a setting out of range, and for complex weights."""
        check_options("APOLLO", {**self.defaults, **param_group})
        if param_group.get("rank", 1) is None:
            raise MolsConfigError("APOLLO: rank=None; give a whole number >= 1, or leave it out for Adam's group")
        super().add_param_group(param_group)
        if any(weight.is_complex() for weight in self.param_groups[-1]["params"]):
            raise MolsConfigError("APOLLO does not support complex weights; leave them to another optimizer")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch: overloads
        """Update every tensor with a gradient; return the closure's loss, if any."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)
        return loss

    def _update(self, weight: Tensor, gradient: Tensor, group: Settings) -> None:
        if gradient.is_sparse:
            raise MolsUnsupportedError('APOLLO does not support sparse gradients: set "sparse_gradients": false')
        state = self.state[weight]
        step = state["step"] = state.get("step", 0) + 1
        low_rank = "rank" in group and weight.ndim == 2
        seen = gradient
        if low_rank:  # R = P G, with a new P at the first step and every `update_proj_gap` steps
            past, rest = divmod(step - 1, group["update_proj_gap"])
            if rest == 0 or "projection" not in state:
                shape = (gradient.shape[0], gradient.shape[1])
                state["projection"] = projection(shape, group["rank"], past, gradient.device, gradient.dtype)
            seen = project(gradient, state["projection"])
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(seen), torch.zeros_like(seen)
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(seen, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(seen, seen, value=1 - beta2)
        update = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])
        if low_rank:
            factors = scaling(seen, update, group["scale_type"])
            wide = gradient.shape[0] < gradient.shape[1]
            update = gradient * (factors if wide or factors.ndim == 0 else factors[:, None])
            update, state["update_norm"] = limit_growth(update, state.get("update_norm"))
            update = update * group["scale"]
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step))
