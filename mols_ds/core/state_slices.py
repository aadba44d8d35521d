"""Optimizer state of a tensor while views of it stand in for it: what each view gets, and what is copied back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer


class Sliced(NamedTuple):
    """The views that stand in for one tensor during a step, and the scalar state to copy back afterwards."""

    tensor: Tensor
    views: list[Tensor]


def copied(value: Any) -> Any:
    """A copy of a value of a parameter group that a step may change in place; any other value itself."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.deepcopy(value) if isinstance(value, list | dict | set) else value


def sliceable(value: object, tensor: Tensor) -> bool:
    """Whether an entry of a tensor's state can be cut as the tensor is."""
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.is_contiguous()
        return plain and (value.numel() == tensor.numel() or value.numel() == 1)
    return isinstance(value, int | float | bool)


def slices_of(value: object, tensor: Tensor, lengths: list[int]) -> Sequence[object]:
    """What of one entry of a tensor's state goes to each run: its part, a copy of a counter, or a plain number."""
    if not isinstance(value, Tensor):
        return [value] * len(lengths)
    if value.numel() == tensor.numel():
        return torch.split(value.view(-1), lengths)
    return value.expand(len(lengths), *value.shape).clone().unbind()


def align_counters(optimizer: Optimizer) -> None:
    """Give every tensor of a group the group's step count before the group is cut into several lists."""
    for group in optimizer.param_groups:
        states = [optimizer.state[p] for p in group["params"] if "step" in optimizer.state.get(p, {})]
        step = max((s["step"] for s in states), default=0)
        for state in states:
            state["step"] = step


def write_back(optimizer: Optimizer, slices: Sliced) -> None:
    """Copy the counters of the views to the tensor that they stood in for.

    Tensor counters advance on every view alike. Of plain numbers, take the one that changed: with a shared
    counter, only the last view of a list counts.
    """
    target = optimizer.state[slices.tensor]
    states = [optimizer.state[view] for view in slices.views]
    for key, old in target.items():
        if not isinstance(old, Tensor):
            target[key] = next((s[key] for s in states if s[key] != old), old)
        elif old.numel() == 1:
            old.copy_(states[0][key])
