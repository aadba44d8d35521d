"""Adam on CPU tensors, with the state layout of Transformer Engine's and apex's FusedAdam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from mols_ds.optim.sharded import loss_of

ParamGroup = dict[str, Any]


class CpuFusedAdam(Optimizer):
    """Adam or AdamW with the step count in the parameter group, as in Transformer Engine and apex.

    State of a parameter: `exp_avg` and `exp_avg_sq`, with its shape and dtype. Bit-identical to
    `torch.optim.AdamW(foreach=False)` (`adam_w_mode`) or `torch.optim.Adam(foreach=False)`: the same operations in the
    same order. The step of a group without parameters does not advance, as in Transformer Engine.

    Raises:
        ValueError: amsgrad or another option of FusedAdam that this class lacks.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **unsupported: Any,
    ) -> None:
        asked = {name: value for name, value in unsupported.items() if value}
        if asked:
            raise ValueError(f"CpuFusedAdam has no {', '.join(asked)}: it emulates FusedAdam with fp32 states only")
        self.adam_w_mode = adam_w_mode
        defaults = dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)

    def initialize_state(self, param: Tensor) -> None:
        """Set the moments of `param` to zeros."""
        self.state[param] = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = loss_of(closure)
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)
        return loss

    def _update(self, param: Tensor, grad: Tensor, group: ParamGroup) -> None:
        """Update by Kingma and Ba (2015), algorithm 1; decoupled decay by Loshchilov and Hutter (2019)."""
        if not self.state[param]:
            self.initialize_state(param)
        lr, decay, (beta1, beta2), step = float(group["lr"]), group["weight_decay"], group["betas"], group["step"]
        if decay and self.adam_w_mode:
            param.mul_(1 - lr * decay)
        elif decay:
            grad = grad.add(param, alpha=decay)
        mean, square = self.state[param]["exp_avg"], self.state[param]["exp_avg_sq"]
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        corrected = group["bias_correction"]
        correction1, correction2 = (1 - beta1**step, 1 - beta2**step) if corrected else (1.0, 1.0)
        denominator = (square.sqrt() / correction2**0.5).add_(group["eps"])
        param.addcdiv_(mean, denominator, value=-lr / correction1)
