"""Compute the rate that an Adam step applied to each module group from the change of the weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

LEAST = 0.2
"""Elements whose update is smaller (in units of the rate) are ignored: rounding of the weight would show."""


class Applied(NamedTuple):
    """Smallest and largest rate of the elements of a module group, over their parameter group's rate, and how many."""

    low: float
    high: float
    elements: int


class Watch:
    """Works out the applied rates of every inner step of `mols`' optimizer, from its construction until `remove()`.

    For each element lr = (w_old - w_new) / u with Adam's update u = m' / (sqrt(v') + eps) + decay * w_old, of the
    moments that the step left (Kingma and Ba, algorithm 1, with decoupled decay).

    Attributes:
        rates: module group -> `Applied` of the last step.
        bases: parameter-group rates during the last step, as the scheduler set them.
    """

    def __init__(self, mols: Any) -> None:
        self.mols = mols
        self.rates: dict[str, Applied] = {}
        self.bases: set[float] = set()
        self._before: list[tuple[Any, Any, Tensor, float]] = []
        self._hooks = []
        for part in mols.shards.parts:
            if part.inner is None:
                continue
            self._hooks.append(part.inner.register_step_post_hook(self._after))

    def start(self) -> None:
        """Before each `optimizer.step()`."""
        self.rates, self.bases, self._before = {}, set(), []
        for part in self.mols.shards.parts:
            for shard in part.shards:
                base = float(part.inner.param_groups[shard.group]["lr"])
                self._before.append((part.inner, shard, shard.tensor.detach().clone().view(-1), base))

    @torch.no_grad()
    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for inner, shard, old, base in self._before:
            if inner is not optimizer or base == 0.0:
                continue
            group, state = inner.param_groups[shard.group], inner.state[shard.tensor]
            assert float(group["lr"]) == base, "the base rate must be back after the step"
            self.bases.add(base)
            step = int(state.get("step", group.get("step")))
            beta1, beta2 = group["betas"]
            mean = state["exp_avg"].view(-1).double() / (1 - beta1**step)
            root = (state["exp_avg_sq"].view(-1).double() / (1 - beta2**step)).sqrt()
            update = mean / (root + group["eps"]) + group["weight_decay"] * old
            rate = (old.double() - shard.tensor.view(-1).double()) / update / base
            layout = self.mols.controller.table.layouts[shard.local.name]
            views = zip(layout.views(rate, shard.range.start), layout.views(update, shard.range.start), strict=True)
            for (name, found), (_, of) in views:
                seen = found[of.abs() > LEAST]
                if seen.numel():
                    was = self.rates.get(name, Applied(float("inf"), 0.0, 0))
                    low, high = min(was.low, float(seen.min())), max(was.high, float(seen.max()))
                    self.rates[name] = Applied(low, high, was.elements + seen.numel())

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
