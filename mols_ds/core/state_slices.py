"""Slice the optimizer state of a tensor for views of it, and copy counters back afterwards."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer


class Sliced(NamedTuple):
    """A tensor and the views that replace it during a step."""

    tensor: Tensor
    views: list[Tensor]


def copied(value: Any) -> Any:
    """Copy a value of a parameter group if a step may change it in place; return other values unchanged."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.deepcopy(value) if isinstance(value, list | dict | set) else value


def sliceable(value: object, tensor: Tensor) -> bool:
    """Whether an entry of a tensor's state can be sliced like the tensor."""
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.is_contiguous()
        return plain and (value.numel() == tensor.numel() or value.numel() == 1)
    return isinstance(value, int | float | bool)


def slices_of(value: object, tensor: Tensor, lengths: list[int]) -> Sequence[object]:
    """Divide an entry of a tensor's optimizer state among views of the tensor.

    Args:
        value: the entry, `sliceable`.
        tensor: the whole tensor.
        lengths: elements of each view, in order; their sum is `tensor.numel()`.

    Returns:
        One item per view: a 1-D slice (shares memory), a copy of a tensor counter, or the plain number.
    """
    if not isinstance(value, Tensor):
        return [value] * len(lengths)
    if value.numel() == tensor.numel():
        return torch.split(value.view(-1), lengths)
    return value.expand(len(lengths), *value.shape).clone().unbind()


def align_counters(optimizer: Optimizer) -> None:
    """Set the step count of every tensor of a group to the group's, before the group is split into several lists."""
    for group in optimizer.param_groups:
        states = [optimizer.state[p] for p in group["params"] if "step" in optimizer.state.get(p, {})]
        step = max((s["step"] for s in states), default=0)
        for state in states:
            state["step"] = step


def write_back(optimizer: Optimizer, slices: Sliced) -> None:
    """Copy the counters of the views to their tensor.

    Tensor counters advance alike on every view. Of plain numbers, use the one that changed: a shared counter counts
    only the last view of a list.
    """
    target = optimizer.state[slices.tensor]
    states = [optimizer.state[view] for view in slices.views]
    for key, old in target.items():
        if not isinstance(old, Tensor):
            target[key] = next((s[key] for s in states if s[key] != old), old)
        elif old.numel() == 1:
            old.copy_(states[0][key])
