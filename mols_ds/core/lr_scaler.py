"""Applies a learning-rate multiplier per module group around an optimizer's step.

Between torch's step hooks the optimizer sees temporary parameter groups with lr x multiplier; afterwards everything is
put back, so that schedulers, logging and checkpoints see the base rate and the stock layout, and nothing can compound.

A tensor whose elements belong to several groups (a ZeRO flat shard, a fused projection) is stepped in one of two ways:
- **views**: contiguous runs of equal multiplier become views of the weight, the gradient and the optimizer state. No
  copy and no extra pass; bit for bit what an optimizer over separate tensors does. For elementwise optimizers only.
- **delta**: a range is stepped with its largest multiplier `lead`, then w = w_old + (s / lead) * (w_new - w_old) on
  the other ranges, with a transient copy of just those. Exact for every update that is proportional to lr (decoupled
  weight decay included). For interleaved ranges (GPT-2's columns) and optimizers that look at whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from mols_ds.core.groups import ElementLayout

MAX_RUNS = 16
"""A piece with more contiguous runs than this is interleaved: views would be many and small, delta is cheaper."""


class Piece(NamedTuple):
    """Elements [start, start + numel) of parameter `name`, lying at [offset, offset + numel) of an inner tensor."""

    name: str
    start: int
    offset: int
    numel: int


class Run(NamedTuple):
    """A contiguous range of an inner tensor with the groups in it: one, none (padding), or several (interleaved)."""

    lo: int
    hi: int
    groups: tuple[str, ...]

    def rate(self, multipliers: Mapping[str, float]) -> float:
        """What the range is stepped with: of several groups the largest, so that delta never magnifies rounding."""
        if len(self.groups) == 1:
            return multipliers.get(self.groups[0], 1.0)
        return max((multipliers.get(group, 1.0) for group in self.groups), default=1.0)


class Mixed(NamedTuple):
    """Interleaved elements of a parameter; those whose rate is not the largest are corrected by delta."""

    run: Run
    start: int
    layout: ElementLayout


@dataclass(slots=True)
class Plan:
    """How one inner tensor is cut: runs cover it without gap or overlap."""

    runs: list[Run]
    mixed: list[Mixed]

    def groups(self) -> set[str]:
        return {group for run in self.runs for group in run.groups}


def make_plan(numel: int, pieces: Iterable[Piece], layouts: Mapping[str, ElementLayout]) -> Plan:
    """Cut a tensor of `numel` elements; what no piece covers is padding and keeps the base rate."""
    runs: list[Run] = []
    mixed: list[Mixed] = []

    def append(lo: int, hi: int, *groups: str) -> None:
        if hi <= lo:
            return
        if runs and runs[-1].groups == groups:
            runs[-1] = Run(runs[-1].lo, hi, groups)
        else:
            runs.append(Run(lo, hi, groups))

    at = 0
    for piece in sorted(pieces, key=lambda p: p.offset):
        append(at, piece.offset)
        at = piece.offset + piece.numel
        layout = layouts[piece.name]
        if len(layout.groups) > 1 and piece.numel > layout.period * MAX_RUNS // 2:
            mixed.append(Mixed(Run(piece.offset, at, layout.groups), piece.start, layout))
            append(piece.offset, at, *layout.groups)
        else:
            for group, offset, length in layout.runs(piece.start, piece.numel):
                append(piece.offset + offset, piece.offset + offset + length, group)
    append(at, numel)
    return Plan(runs, mixed)


class _Delta(NamedTuple):
    view: Tensor
    old: Tensor
    scale: float


class _Slices(NamedTuple):
    """The views that stand in for one tensor during a step, and the scalar state to copy back afterwards."""

    tensor: Tensor
    views: list[Tensor]


class LRScaler:
    """Scales the rates of `optimizer` by module group through its step hooks, from construction until `remove()`.

    Args:
        optimizer: the inner optimizer, whose `.step()` the engine calls once or once per parameter group or sub-group.
        plans: `id(tensor) -> Plan` of every tensor that the optimizer may be handed.
        multipliers: called at each inner step; group -> multiplier (1 where absent).
        elementwise: whether an element's update reads that element's weight, gradient and state only, so that the
            optimizer may be stepped on views.
        shared_counter: whether the optimizer counts a step on the last tensor of a list only, as DeepSpeed's fused ones
            do (ops/adam/fused_adam.py).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        plans: Mapping[int, Plan],
        multipliers: Callable[[], Mapping[str, float]],
        *,
        elementwise: bool,
        shared_counter: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.plans = dict(plans)
        self.multipliers = multipliers
        self.elementwise = elementwise
        self.shared_counter = shared_counter
        self._saved: list[dict[str, Any]] | None = None
        self._derived: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._slices: list[_Slices] = []
        self._deltas: list[_Delta] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Take the hooks away; the optimizer is stock again."""
        self.restore()
        for hook in self._hooks:
            hook.remove()

    def restore(self) -> None:
        """Put the user's parameter groups back, also after a step that raised half-way."""
        if self._saved is None:
            return
        self.optimizer.param_groups = self._saved
        for slices in self._slices:
            for view in slices.views:
                self.optimizer.state.pop(view, None)
        self._saved, self._derived, self._slices, self._deltas = None, [], [], []

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.restore()
        multipliers = {g: m for g, m in self.multipliers().items() if m != 1.0}
        if not multipliers:
            return
        groups: list[dict[str, Any]] = []
        saved = optimizer.param_groups
        if self.shared_counter:
            _align_counters(optimizer)
        with torch.no_grad():
            for group in saved:
                by_rate: dict[float, list[Tensor]] = {}
                for tensor in group["params"]:
                    for rate, part in self._cut(tensor, multipliers):
                        by_rate.setdefault(rate, []).append(part)
                groups += self._derive(group, by_rate)
        self._saved = saved
        optimizer.param_groups = groups

    def _derive(self, group: dict[str, Any], by_rate: Mapping[float, list[Tensor]]) -> list[dict[str, Any]]:
        if not by_rate or set(by_rate) == {1.0}:
            return [group]
        derived = [{**group, "lr": group["lr"] * rate, "params": parts} for rate, parts in by_rate.items()]
        self._derived.append((group, derived[0]))
        return derived

    def _cut(self, tensor: Tensor, multipliers: Mapping[str, float]) -> list[tuple[float, Tensor]]:
        """The (multiplier, tensor or view) pairs that stand in for `tensor` in this step."""
        plan = self.plans.get(id(tensor))
        if plan is None:
            return [(1.0, tensor)]
        if len(plan.runs) == 1 and not plan.mixed:
            return [(plan.runs[0].rate(multipliers), tensor)]
        runs: list[tuple[int, int, float]] = []
        for run in plan.runs:
            lo, hi, rate = run.lo, run.hi, run.rate(multipliers)
            if runs and runs[-1][2] == rate:
                runs[-1] = (runs[-1][0], hi, rate)
            else:
                runs.append((lo, hi, rate))
        flat = tensor.detach().view(-1)
        for m in plan.mixed:
            lead = m.run.rate(multipliers)
            for group, view in m.layout.views(flat[m.run.lo : m.run.hi], m.start):
                self._delta(view, multipliers.get(group, 1.0) / lead)
        if len(runs) == 1:
            return [(runs[0][2], tensor)]
        views = self._views(tensor, flat, runs)
        if views is not None:
            return views
        for lo, hi, rate in runs:
            self._delta(flat[lo:hi], rate)
        return [(1.0, tensor)]

    def _delta(self, view: Tensor, scale: float) -> None:
        if scale != 1.0:
            self._deltas.append(_Delta(view, view.clone(), scale))

    def _views(
        self, tensor: Tensor, flat: Tensor, runs: Sequence[tuple[int, int, float]]
    ) -> list[tuple[float, Tensor]] | None:
        """Views with sliced gradient and state, or None where this optimizer or its state cannot be sliced."""
        state = self.optimizer.state.get(tensor)
        if not (self.elementwise and state and tensor.grad is not None and tensor.is_contiguous()):
            return None
        if not all(_sliceable(value, tensor) for value in state.values()):
            return None
        lengths = [hi - lo for lo, hi, _ in runs]
        views = torch.split(flat, lengths)
        sliced = {key: _slices(value, tensor, lengths) for key, value in state.items()}
        for view, gradient, values in zip(
            views, torch.split(tensor.grad.view(-1), lengths), zip(*sliced.values(), strict=True), strict=True
        ):
            view.grad = gradient
            self.optimizer.state[view] = dict(zip(sliced, values, strict=True))
        self._slices.append(_Slices(tensor, list(views)))
        return [(rate, view) for (_, _, rate), view in zip(runs, views, strict=True)]

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._saved is None:
            return
        with torch.no_grad():
            for slices in self._slices:
                _write_back(optimizer, slices)
            for view, old, scale in self._deltas:
                view.copy_(old.lerp_(view, scale))
        for group, derived in self._derived:
            group.update({k: v for k, v in derived.items() if k not in ("lr", "params")})
        self.restore()


def _sliceable(value: Any, tensor: Tensor) -> bool:
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.is_contiguous()
        return plain and (value.numel() == tensor.numel() or value.numel() == 1)
    return isinstance(value, int | float | bool)


def _slices(value: Any, tensor: Tensor, lengths: list[int]) -> Sequence[Any]:
    """What of one entry of a tensor's state goes to each run: its part, a copy of a counter, or a plain number."""
    if not isinstance(value, Tensor):
        return [value] * len(lengths)
    if value.numel() == tensor.numel():
        return torch.split(value.view(-1), lengths)
    return value.expand(len(lengths), *value.shape).clone().unbind()


def _align_counters(optimizer: Optimizer) -> None:
    """Give every tensor of a group the group's step count before the group is cut into several lists."""
    for group in optimizer.param_groups:
        states = [optimizer.state[p] for p in group["params"] if "step" in optimizer.state.get(p, {})]
        step = max((s["step"] for s in states), default=0)
        for state in states:
            state["step"] = step


def _write_back(optimizer: Optimizer, slices: _Slices) -> None:
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
