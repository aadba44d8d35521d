"""The libraries' optimizers on whole tensors in one process, with a rate per element.

The libraries know one rate a tensor; a rate of each element is put on their step afterwards:
w <- w_old + alpha_i (w_new - w_old), which is what a step proportional to the rate would have been.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.helpers.oracle.sizes import GROUPS

Tensors = list[nn.Parameter]
LR, BETAS, DECAY = 2e-3, (0.9, 0.95), 0.1
EPS = 1e-4  # far above the float noise of the gradients, which adaptive optimizers would blow up to full steps
RANK, GAP, SCALE = 10, 3, 0.25
MATRICES = ("qk", "vo", "mlp")

# name: (settings as a config gives them, the library's own object over matrices and the rest)
LIBRARY: dict[str, tuple[dict[str, Any], Callable[[Tensors, Tensors], Optimizer]]] = {
    "NAdam": (
        {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY},
        lambda m, r: torch.optim.NAdam(
            m + r, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, decoupled_weight_decay=True
        ),
    ),
    "Lion": (
        {"lr": LR / 4, "betas": (0.9, 0.99), "weight_decay": DECAY},
        lambda m, r: pytorch_optimizer.Lion(m + r, lr=LR / 4, betas=(0.9, 0.99), weight_decay=DECAY),
    ),
    "Lamb": (
        {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY},
        lambda m, r: pytorch_optimizer.Lamb(
            m + r, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, weight_decouple=False, adam_debias=True
        ),
    ),
    "Muon": (
        {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY},
        lambda m, r: pytorch_optimizer.Muon(
            [
                {"params": m, "use_muon": True, "lr": LR, "weight_decay": DECAY, "use_adjusted_lr": True},
                {"params": r, "use_muon": False, "lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY},
            ]
        ),
    ),
    "SOAP": (
        {"lr": LR, "betas": BETAS, "eps": EPS},
        lambda m, r: pytorch_optimizer.SOAP(
            [{"params": m}, {"params": r, "max_precondition_dim": 1}], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0
        ),
    ),
    "Adafactor": (
        {"lr": LR, "weight_decay": DECAY, "eps1": EPS**2},
        lambda m, r: pytorch_optimizer.AdaFactor(
            m + r, lr=LR, betas=(None, 0.999), weight_decay=DECAY, scale_parameter=False, relative_step=False,
            eps1=EPS**2,
        ),
    ),
    "GaLore": (
        {"lr": LR, "betas": BETAS, "eps": EPS, "rank": RANK, "update_proj_gap": GAP},
        lambda m, r: pytorch_optimizer.GaLore(
            [
                {"params": m, "rank": RANK, "update_proj_gap": GAP, "scale": SCALE, "projection_type": "std"},
                {"params": r},
            ],
            lr=LR, betas=BETAS, eps=EPS,
        ),
    ),
}  # fmt: skip


def by_element(optimizer: Optimizer, rates: Mapping[int, Tensor]) -> None:
    """One step of `optimizer`, then each element's rate; `rates`: id of the parameter -> alphas in its shape."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in tensors]
    optimizer.step()
    with torch.no_grad():
        for p, old in zip(tensors, before, strict=True):
            p.copy_(old + rates[id(p)] * (p - old))


def rates_of(model: nn.Module, masks: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[int, Tensor]:
    """id of each parameter in `masks` -> alphas of its elements, float32."""
    values = torch.tensor([alphas.get(group, 1.0) for group in GROUPS])
    return {id(p): values[masks[name]] for name, p in model.named_parameters() if name in masks}


def halves(model: nn.Module, masks: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
    """(2-D weights of the blocks, all other parameters), by the hand-written masks."""
    inside = {GROUPS.index(group) for group in MATRICES}
    matrices: Sequence[str] = [name for name, mask in masks.items() if set(mask.unique().tolist()) <= inside]
    named = dict(model.named_parameters())
    return [named[n] for n in matrices], [p for n, p in named.items() if n in masks and n not in set(matrices)]
