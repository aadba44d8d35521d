"""SGG, scaling with gradient grouping, around Adam (Li et al. 2025, arXiv 2506.01049), correct on ZeRO's flat shards.

Every T steps, the momentum of each layer is clustered into K groups. Each group gets a factor on its learning rate that
pulls its spread towards the whole model's (algorithm 1, equations 5 to 7). Written from the paper: no library has it,
and the authors' repository (ScalingOpt/SGG) has a README and a web page, no code. Choices where the paper is silent:
- A layer is a parameter. Clusters are over m itself (the paper could also mean its magnitude).
- K-means over all elements, from the former centers (at first the mean and +- 1.5 standard deviations), until centers
  stay or for `ITERATIONS`. The paper uses mini-batch K-means for speed; its figure 3 finds full K-means no worse.
  Centers stay sorted, so cluster c means the same in two clusterings.
- D^t, "the typical parameter-wise deviation throughout the model", is the median over all elements of the model.
- The median of an even number of elements is the lower of the two middle ones. A cluster without elements keeps its
  factor. Weight decay is decoupled and not scaled.
- Clusters of step t apply from step t + 1 on: ZeRO steps one parameter group after the other, and D^t needs them all.
Medians are exact, from counts of the bits of |m - mean|. Only counts and sums are communicated, every T steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mols_ds.core.log import warn_here
from mols_ds.errors import MolsConfigError
from mols_ds.optim.clustering import cluster, median_deviations, nearest
from mols_ds.optim.limits import check_options
from mols_ds.optim.param_shards import ParamShard
from mols_ds.optim.sharded import Group, ShardedOptimizer, State, StateParts, update_moment, update_square

ITERATIONS = 20
"""Maximum of K-means rounds; each is one reduction."""
EPSILON = 1e-8
"""Epsilon of equation 6."""


def new_scales(
    scales: Tensor, deviations: Tensor, typical: Tensor, beta3: float, bounds: tuple[float, float]
) -> Tensor:
    """Return beta3 S + (1 - beta3) clamp(D / (D_lc + epsilon)) (2506.01049, equations 6 and 7).

    deviations: D_lc per cluster; NaN for a cluster without elements, which keeps its factor. typical: D, a scalar.
    """
    ratio = (typical / (deviations + EPSILON)).clamp(*bounds)
    return torch.where(deviations.isnan(), scales, beta3 * scales + (1 - beta3) * ratio)


class SGG(ShardedOptimizer):
    """SGG around Adam; see the module docstring.

    State beside Adam's: `cluster` (uint8 per element), and for each range of a parameter `centers` and `scales` (K
    numbers, the same on every rank with a range of that parameter).

    Args:
        params: parameters or groups, as for any torch optimizer; float32.
        lr, betas, eps, weight_decay: as for AdamW; also per group.
        clusters: K >= 1 per layer; the paper's default is 3.
        interval: T, steps between clusterings; default 500.
        beta3: decay of the factors; default 0.99.
        bounds: of the factors; default (0.1, 10).
    """

    settings = ("clusters", "interval", "beta3", "bounds")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clusters: int = 3,
        interval: int = 500,
        beta3: float = 0.99,
        bounds: tuple[float, float] = (0.1, 10.0),
    ) -> None:
        own = {"clusters": clusters, "interval": interval, "beta3": beta3, "bounds": bounds}
        check_options("SGG", own)
        low, high = bounds
        self.clusters, self.interval, self.beta3, self.bounds = clusters, interval, beta3, (low, high)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def load_state_dict(self, state_dict: State) -> None:
        """torch casts all loaded state to the weights' dtype; cluster numbers are uint8."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "cluster" in state:
                state["cluster"] = state["cluster"].to(torch.uint8)

    def _parts(self, tensor: Tensor, shards: Sequence[ParamShard]) -> StateParts:
        state, shape = self.state[tensor], (len(shards), self.clusters)
        if state["step"] and "exp_avg" in state and "cluster" not in state:
            warn_here(
                "SGG: the checkpoint has Adam's moments without clusters (a universal one, or another optimizer's): "
                "all factors start at 1 again"
            )
        if "scales" in state and tuple(state["scales"].shape) != shape:
            raise MolsConfigError(
                f"SGG: the state has factors of shape {tuple(state['scales'].shape)} (parameters, clusters), this run "
                f"{shape}; resume with the number of clusters that it was saved with"
            )
        return {
            "exp_avg": lambda: torch.zeros_like(tensor),
            "exp_avg_sq": lambda: torch.zeros_like(tensor),
            "cluster": lambda: torch.zeros_like(tensor, dtype=torch.uint8),
            "centers": lambda: tensor.new_zeros(shape),
            "scales": lambda: tensor.new_ones(shape),
            "clustered": lambda: 0,
        }

    def _before_step(self) -> None:
        """Cluster the momentum of the last step if that was a T-th step.

        A ZeRO step is complete when all shards have taken it. So this runs in the first call of the next step, on every
        rank. If tensors are whole parameters, one call is one step, and some may never have a gradient.
        """
        tensors = [tensor for tensor in self._tensors if self.state.get(tensor)]
        steps = {int(self.state[tensor]["step"]) for tensor in tensors} or {0}
        complete = len(steps) == 1 and len(tensors) == len(self._tensors)
        step = max(steps) if complete or self._reduce is None else 0
        if step == 0 or step % self.interval or all(self.state[t].get("clustered") == step for t in tensors):
            return
        for tensor in tensors:
            self._complete(tensor)
        self._cluster(tensors, fresh=not any(self.state[tensor]["clustered"] for tensor in tensors))
        for tensor in tensors:
            self.state[tensor]["clustered"] = step

    def _cluster(self, tensors: Sequence[Tensor], *, fresh: bool) -> None:
        """Compute clusters, centers and factors of every shard. Collective."""
        layers = [(shard, self.state[tensor]) for tensor in tensors for shard in self._find(tensor)]
        momenta = [(shard.number, shard.of(state["exp_avg"].view(-1))) for shard, state in layers]
        sizes = torch.tensor(self._numels, dtype=torch.float64, device=self._tensors[0].device)
        centers = sizes.new_zeros(sizes.numel(), self.clusters, dtype=torch.float32)
        for shard, state in layers:
            centers[shard.number] = state["centers"][shard.row]
        reduce = self._reduce or (lambda values: values)
        found = cluster(momenta, sizes, None if fresh else centers, self.clusters, reduce, ITERATIONS)
        medians = median_deviations(momenta, found, reduce)
        for (shard, state), (number, values) in zip(layers, momenta, strict=True):
            state["centers"][shard.row] = found.centers[number]
            old, deviations = state["scales"][shard.row], medians.clusters[number]
            state["scales"][shard.row] = new_scales(old, deviations, medians.overall, self.beta3, self.bounds)
            shard.of(state["cluster"].view(-1)).copy_(nearest(values, found.centers[number]))

    def _apply(self, group: Group, state: State, tensor: Tensor, shard: ParamShard, sums: Tensor) -> None:
        """w <- w - lr lambda w - lr S[C] m_hat / (sqrt(v_hat) + eps): AdamW, and line 24 of the paper's algorithm."""
        (beta1, beta2), lr, step = group["betas"], group["lr"], state["step"]
        weight, gradient = shard.of(tensor.view(-1)), self._gradient(tensor, shard)
        mean, square = shard.of(state["exp_avg"].view(-1)), shard.of(state["exp_avg_sq"].view(-1))
        update_moment(mean, gradient, beta1)
        update_square(square, gradient, beta2)
        update = mean / (square.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        if state["clustered"]:
            update.mul_(state["scales"][shard.row].index_select(0, shard.of(state["cluster"].view(-1)).int()))
        if group["weight_decay"]:
            weight.mul_(1 - lr * group["weight_decay"])
        weight.sub_(update, alpha=lr / (1 - beta1**step))
