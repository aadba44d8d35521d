"""Optimizers that the scenarios pass to DeepSpeed as the user's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tests.scenarios.reference_optimizer import BETAS, EPS, MOMENTUM
from tests.scenarios.scenario import RunSettings


class CustomAdamW(torch.optim.AdamW):
    """A class that is not in the catalog: MoLS lets it step, then corrects the scaled ranges."""


class FusedAdam(torch.optim.Optimizer):
    """Like apex's FusedAdam with `capturable=True`: a parameter group counts its steps in a tensor, in place."""

    __module__ = "apex.optimizers.fused_adam"

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": BETAS, "eps": EPS, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            if "step" in group:
                group["step"] += 1
            else:
                group["step"] = torch.tensor(1)
            steps, decay = int(group["step"]), group["lr"] * group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["exp_avg"].lerp_(p.grad, 1 - BETAS[0])
                state["exp_avg_sq"].mul_(BETAS[1]).addcmul_(p.grad, p.grad, value=1 - BETAS[1])
                denominator = (state["exp_avg_sq"] / (1 - BETAS[1] ** steps)).sqrt_() + EPS
                p.mul_(1 - decay).addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - BETAS[0] ** steps))


def optimizer_of(settings: RunSettings, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The user's optimizer."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=MOMENTUM)
    if settings.optimizer == "fused_adam":
        return FusedAdam(groups)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "custom": CustomAdamW}[settings.optimizer]
    return kind(groups, betas=BETAS, eps=EPS)
