"""Watch the first scaled steps: was each tensor with a gradient stepped, and only once?

An unknown optimizer may have lists or tables beside its parameter groups. With temporary groups it would leave out
tensors or count a step several times, without an error. The guard compares a few numbers of each tensor and its state
before and after the step. It does not communicate or copy a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from mols_ds.core.pieces import gradient_of, local_part

Numbers = tuple[float, ...]
ROUNDING = 64.0
"""A weight without optimizer state must move only if lr x gradient is at least this many times its rounding."""


class _Watched(NamedTuple):
    """A tensor (or view) of the optimizer: the compared indices, and their values before the step."""

    tensor: Tensor
    at: Tensor
    weights: Numbers
    state: Mapping[str, Numbers]
    has_to_move: bool


class StepGuard:
    """Compare an optimizer before and after one step.

    Args:
        optimizer: with the parameter groups of the step.
        groups: its own parameter groups, whose counters must advance by one.
    """

    def __init__(self, optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
        self.optimizer = optimizer
        self.counters = [_count(group.get("step")) for group in groups]
        self.watched = [
            found
            for group in optimizer.param_groups
            for tensor in group["params"]
            if (found := _watch(optimizer, tensor, float(group["lr"]))) is not None
        ]

    def problem(self, groups: Sequence[Mapping[str, Any]]) -> str:
        """Describe what went wrong in the step; "": nothing. `groups`: the optimizer's own, after the step.

        If no tensor was stepped, nothing is wrong: the optimizer skipped the step (a non-finite gradient).
        """
        still, stepped, twice = 0, 0, 0
        for one in self.watched:
            after = _state_numbers(self.optimizer, one.tensor, one.at)
            if _differ(_at(one.tensor, one.at), one.weights) or after != one.state:
                stepped += 1
            elif after or one.has_to_move:
                still += 1
            twice += _advance(one.state.get("step"), after.get("step")) > 1
        for group, before in zip(groups, self.counters, strict=True):
            twice += _advance(before, _count(group.get("step"))) > 1
        name = type(self.optimizer).__name__
        if still and stepped:
            return (
                f"optimizer {name} left out {still} of {still + stepped} tensors with a gradient in a scaled step "
                "(does it keep a list in addition to its parameter groups?): use Adam, AdamW, SGD, Lion, ..."
            )
        if twice:
            return (
                f"optimizer {name} counted one scaled step more than once in {twice} of its counters (do its parameter "
                "groups share one?): use Adam, AdamW, SGD, Lion, ..."
            )
        return ""


def _watch(optimizer: Optimizer, tensor: Tensor, lr: float) -> _Watched | None:
    """Return None for a tensor without a gradient, with a zero or non-finite one, or with lr 0."""
    gradient = gradient_of(tensor)
    if gradient is None or gradient.layout != torch.strided:
        return None
    gradient, part = local_part(gradient), local_part(tensor)
    if gradient.numel() == 0:
        return None
    flat = gradient.detach().reshape(-1)
    at = torch.stack([flat.argmax(), flat.argmin()])
    largest = float(flat[at].abs().max())
    if lr == 0.0 or not 0.0 < largest < float("inf") or gradient.numel() != part.numel():
        return None
    weights = _at(tensor, at)
    rounding = torch.finfo(tensor.dtype).eps * max(abs(weight) for weight in weights)
    return _Watched(
        tensor, at, weights, _state_numbers(optimizer, tensor, at), lr * largest > ROUNDING * max(rounding, 1e-30)
    )


def _at(tensor: Tensor, at: Tensor) -> Numbers:
    part = local_part(tensor).detach()
    return tuple(part.reshape(-1)[at.to(part.device)].double().tolist())


def _state_numbers(optimizer: Optimizer, tensor: Tensor, at: Tensor) -> dict[str, Numbers]:
    """Return a few numbers of each entry of the tensor's state."""
    found: dict[str, Numbers] = {}
    for key, value in optimizer.state.get(tensor, {}).items():
        if isinstance(value, Tensor) and value.numel() > 0 and not value.is_complex():
            part = local_part(value)
            same = part.numel() == local_part(tensor).numel()
            found[key] = _at(part, at if same else torch.tensor([0, part.numel() - 1], device="cpu"))
        elif isinstance(value, int | float):
            found[key] = (float(value),)
    return found


def _differ(one: Numbers, other: Numbers) -> bool:
    """Whether numbers differ; NaN equals NaN."""
    return any(a != b and not (a != a and b != b) for a, b in zip(one, other, strict=True))


def _count(value: object) -> Numbers | None:
    if isinstance(value, Tensor) and value.numel() == 1:
        return (float(value),)
    return (float(value),) if isinstance(value, int | float) else None


def _advance(before: Numbers | None, after: Numbers | None) -> float:
    return after[0] - before[0] if before is not None and after is not None else 0.0
