"""LAMB (You et al. 2020, arXiv 1904.00962), correct on ZeRO's flat shards.

The trust ratio ||w|| / ||u|| scales the update of a layer; its norms are over the whole parameter. A library's LAMB
would use the norms of the shard. This one adds up the squares of all ranks' shards.

The default is pytorch_optimizer's Lamb (the paper's third version: no bias correction, ||w|| clamped at 10), with
- `weight_decouple=False`: weight decay is inside u, as in the paper's algorithm 2, and the step is proportional to lr;
- `adam_debias=True`: without it, that class divides the rate by 1 - beta1^t: a first step with ten times the rate,
  which no version of the paper has.
The engine clips by the global norm, which that class calls pre_norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mols_ds.optim.param_shards import ParamShard
from mols_ds.optim.sharded import Group, ShardedOptimizer, State, StateParts, update_moment, update_square


def lamb_direction(mean: Tensor, square: Tensor, weight: Tensor, eps: float, decay: float) -> Tensor:
    """Return u = m / (sqrt(v) + eps) + lambda w (1904.00962, algorithm 2): a new tensor; all of one shape."""
    update = mean / square.sqrt().add_(eps)
    return update.add_(weight, alpha=decay) if decay else update


def trust_ratio(weight_squares: Tensor, update_squares: Tensor, eps: float, clamp: float) -> Tensor:
    """Return phi(||w||) / (||u|| + eps) with phi(x) = min(x, clamp); 1 where a norm is 0.

    Args:
        weight_squares, update_squares: sums of squares over whole parameters, float64, any shape.
        eps: as in pytorch_optimizer's Lamb.
        clamp: upper bound of ||w||.
    """
    weight, update = weight_squares.sqrt(), update_squares.sqrt()
    ratio = weight.clamp(max=clamp) / (update + eps)
    return torch.where((weight > 0) & (update > 0), ratio, torch.ones_like(ratio))


class ShardedLamb(ShardedOptimizer):
    """LAMB; see the module docstring.

    Args:
        params: parameters or groups, as for any torch optimizer; float32.
        lr, betas, eps, weight_decay: as in the paper; also per group.
        bias_correction: divide m and v by 1 - beta^t, as in the paper's algorithm but not its third version.
        clamp: upper bound of ||w|| in the trust ratio; None: none, as in the paper's experiments.
    """

    kinds = 2

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = False,
        clamp: float | None = 10.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": bias_correction, "clamp": clamp})

    def _parts(self, tensor: Tensor, shards: Sequence[ParamShard]) -> StateParts:
        return {"exp_avg": lambda: torch.zeros_like(tensor), "exp_avg_sq": lambda: torch.zeros_like(tensor)}

    def _direction(self, group: Group, state: State, weight: Tensor, shard: ParamShard) -> Tensor:
        mean, square = shard.of(state["exp_avg"].view(-1)), shard.of(state["exp_avg_sq"].view(-1))
        if group["bias_correction"]:
            beta1, beta2 = group["betas"]
            mean = mean / (1 - beta1 ** state["step"])
            square = square / (1 - beta2 ** state["step"])
        return lamb_direction(mean, square, weight, group["eps"], group["weight_decay"])

    def _measure(self, group: Group, state: State, tensor: Tensor, shard: ParamShard, out: Tensor) -> None:
        beta1, beta2 = group["betas"]
        weight, gradient = shard.of(tensor.view(-1)), self._gradient(tensor, shard)
        update_moment(shard.of(state["exp_avg"].view(-1)), gradient, beta1)
        update_square(shard.of(state["exp_avg_sq"].view(-1)), gradient, beta2)
        shard.add_squares(weight, out[0])
        shard.add_squares(self._direction(group, state, weight, shard), out[1])

    def _apply(self, group: Group, state: State, tensor: Tensor, shard: ParamShard, sums: Tensor) -> None:
        weight = shard.of(tensor.view(-1))
        ratio = trust_ratio(sums[0], sums[1], group["eps"], group["clamp"] or math.inf)
        update = self._direction(group, state, weight, shard)
        weight.sub_(update.mul_((group["lr"] * ratio).to(update.dtype)))
