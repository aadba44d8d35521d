"""Apply a learning-rate multiplier per module group around an optimizer's step.

Between torch's step hooks the optimizer has temporary parameter groups with lr x multiplier. Afterwards it has its own:
schedulers, logs and checkpoints see the base rate and the stock layout. Nothing compounds.
`torch.compile(optimizer.step)` leaves the hooks out of its graphs: traced, they would not restore the groups.

A tensor with elements of several groups (a ZeRO flat shard, a fused projection) is stepped in one of two ways:
- **views**: contiguous segments of equal multiplier become views of the weight, the gradient and the optimizer state.
  No copy, no extra pass, bit for bit equal to an optimizer over separate tensors. For elementwise optimizers only.
- **delta**: a range is stepped with its largest multiplier `lead`. Then w = w_old + (s / lead) * (w_new - w_old) on its
  other parts, from a copy of just those. Exact for updates proportional to lr (decoupled weight decay included). For
  interleaved ranges (GPT-2's columns) and optimizers that use whole tensors.

An optimizer that may find tensors outside `param_groups` gets no temporary groups. It steps at the base rate, and delta
with lead = 1 corrects every scaled range, from a copy of all of them.

Decoupled weight decay is lr x weight_decay x w, so the multiplier scales it too. To keep the decay of the base rate, a
temporary group has weight_decay / multiplier, and delta mixes the new weights with w_old (1 - lr x weight_decay).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from mols_ds.core.layout import ElementLayout
from mols_ds.core.pieces import gradient_of, local_part
from mols_ds.core.ranges import ShardRange
from mols_ds.core.state_slices import Sliced, align_counters, copied, sliceable, slices_of, write_back
from mols_ds.core.step_guard import StepGuard

ParamGroup = dict[str, Any]
MAX_SEGMENTS = 16
"""A range with more segments is interleaved: delta is cheaper than many small views."""
LONG_RUN = 1 << 18
"""Elements. Segments with at least this mean length become views (if the optimizer allows views), however many there
are: a copy would be large (fused projections of Megatron models of 7B and more)."""


class Segment(NamedTuple):
    """Elements [lo, hi) of an inner tensor and their groups: one, none (padding), or several (interleaved)."""

    lo: int
    hi: int
    groups: tuple[str, ...]

    def rate(self, multipliers: Mapping[str, float]) -> float:
        """Multiplier of the step. The largest of several groups, so that delta never amplifies rounding."""
        if len(self.groups) == 1:
            return multipliers.get(self.groups[0], 1.0)
        return max((multipliers.get(group, 1.0) for group in self.groups), default=1.0)


class InterleavedSegment(NamedTuple):
    """A segment with several groups: elements [start, ...) of a parameter with this layout. Delta corrects the elements
    whose multiplier is not the largest."""

    segment: Segment
    start: int
    layout: ElementLayout


@dataclass(slots=True)
class SegmentPlan:
    """How to step one inner tensor. The segments cover it without gap or overlap."""

    segments: list[Segment]
    interleaved: list[InterleavedSegment]

    def groups(self) -> set[str]:
        return {group for segment in self.segments for group in segment.groups}


def make_plan(
    numel: int, ranges: Iterable[ShardRange], layouts: Mapping[str, ElementLayout], *, elementwise: bool = False
) -> SegmentPlan:
    """Cut a tensor of `numel` elements into segments. Elements in no range are padding and keep the base rate.

    Args:
        ranges: of the parameters in the tensor.
        layouts: parameter name -> layout.
        elementwise: the optimizer may step views, so long segments are never interleaved.
    """
    segments: list[Segment] = []
    interleaved: list[InterleavedSegment] = []

    def append(lo: int, hi: int, *groups: str) -> None:
        if hi <= lo:
            return
        if segments and segments[-1].groups == groups:
            segments[-1] = Segment(segments[-1].lo, hi, groups)
        else:
            segments.append(Segment(lo, hi, groups))

    at = 0
    for item in sorted(ranges, key=lambda r: r.offset):
        append(at, item.offset)
        at = item.offset + item.numel
        layout = layouts[item.name]
        if is_interleaved(layout, item.numel, elementwise=elementwise):
            interleaved.append(InterleavedSegment(Segment(item.offset, at, layout.groups), item.start, layout))
            append(item.offset, at, *layout.groups)
        else:
            for group, offset, length in layout.runs(item.start, item.numel):
                append(item.offset + offset, item.offset + offset + length, group)
    append(at, numel)
    return SegmentPlan(segments, interleaved)


def is_interleaved(layout: ElementLayout, numel: int, *, elementwise: bool) -> bool:
    """Whether delta corrects `numel` elements of a parameter group by group, instead of views."""
    if len(layout.groups) == 1 or numel <= layout.period * MAX_SEGMENTS // 2:
        return False
    return not elementwise or layout.period < len(layout.pattern) * LONG_RUN


class _Delta(NamedTuple):
    """A range to set to (1 - scale) x `old` + scale x (its weights after the step). old: weights before the step,
    decayed at the base rate where decay is not scaled."""

    view: Tensor
    old: Tensor
    scale: float


class _Derived(NamedTuple):
    """A parameter group, the temporary group that gives its new values, and that group's values before the step."""

    group: ParamGroup
    source: ParamGroup
    made: ParamGroup

    def write_back(self) -> None:
        """Copy values that the step changed back to the group. A tensor changed in place stays the same object."""
        for key, value in self.source.items():
            if key in ("lr", "params") or (key == "weight_decay" and value is self.made.get(key)):
                continue
            old, in_place = self.group.get(key), value is self.made.get(key)
            if in_place and isinstance(old, Tensor):
                old.copy_(value)
            else:
                self.group[key] = value


class LRScaler:
    """Scale the learning rates of `optimizer` by module group, through step hooks, until `remove()`.

    Args:
        optimizer: the inner optimizer. The engine calls its `.step()` once, or once per parameter group or sub-group.
        plans: `id(tensor)` -> `SegmentPlan`, for every tensor that the optimizer may get.
        multipliers: called at each inner step; returns group -> multiplier (1 if absent).
        elementwise: the update of an element reads only its own weight, gradient and state, so views may be stepped.
        shared_counter: the optimizer counts a step only on the last tensor of a list, as DeepSpeed's fused ones do
            (ops/adam/fused_adam.py).
        groups_only: the step finds its tensors in `param_groups` alone, so it may get temporary groups. None: as
            `elementwise`.
        parallel_list: attribute that the optimizer zips with `param_groups`, with an entry {"params": [None, ...]} per
            group; replaced during the step. "": none.
        unscaled_decay: None: weight decay is scaled like the rate. Else it stays at the base rate, and this function
            runs before each scaled step; it raises where that is impossible (`mols_ds.optim.traits.check_unscaled`).

    Attributes:
        watching: compare scaled steps before and after (`StepGuard`).
        problem: message of the first wrong step; "": none.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        plans: Mapping[int, SegmentPlan],
        multipliers: Callable[[], Mapping[str, float]],
        *,
        elementwise: bool,
        shared_counter: bool = False,
        groups_only: bool | None = None,
        parallel_list: str = "",
        unscaled_decay: Callable[[], None] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.plans = dict(plans)
        self.multipliers = multipliers
        self.elementwise = elementwise
        self.shared_counter = shared_counter
        self.groups_only = elementwise if groups_only is None else groups_only
        self.parallel_list = parallel_list
        self.unscaled_decay = unscaled_decay
        self.watching = False
        self.problem = ""
        self._guard: StepGuard | None = None
        self._known, self._unknown = set(self.plans), list[Tensor]()
        self._saved_list: list[ParamGroup] | None = None
        self._saved: list[ParamGroup] | None = None
        self._derived: list[_Derived] = []
        self._slices: list[Sliced] = []
        self._deltas: list[_Delta] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Remove the hooks: the optimizer is stock again."""
        self.restore()
        for hook in self._hooks:
            hook.remove()

    def keep_order(self) -> None:
        """Make our hooks the last before the step and the first after it, whatever hooks were registered since.

        User hooks then see their own parameter groups with the base rate, and final weights.
        """
        for hook, last in zip(self._hooks, (True, False), strict=True):
            hooks: Any = hook.hooks_dict_ref()
            if hook.id in hooks:
                hooks.move_to_end(hook.id, last=last)

    def restore(self) -> None:
        """Restore the user's parameter groups, also after a step that raised."""
        self._deltas, self._guard = [], None
        if self._saved is None:
            return
        self.optimizer.param_groups = self._saved
        if self._saved_list is not None:
            setattr(self.optimizer, self.parallel_list, self._saved_list)
        for sliced in self._slices:
            for view in sliced.views:
                self.optimizer.state.pop(view, None)
        self._saved, self._saved_list, self._derived, self._slices = None, None, [], []

    def take_unplanned(self) -> list[Tensor]:
        """Return the tensors stepped with a gradient but without a plan, each once. They keep the base rate."""
        taken, self._unknown = self._unknown, []
        return taken

    def _note_unplanned(self) -> None:
        for group in self.optimizer.param_groups:
            for tensor in group["params"]:
                if id(tensor) not in self._known and tensor.grad is not None:
                    self._known.add(id(tensor))
                    self._unknown.append(tensor)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self.restore()
        self._note_unplanned()
        multipliers = {g: m for g, m in self.multipliers().items() if m != 1.0}
        if not multipliers:
            return
        if self.unscaled_decay is not None:
            self.unscaled_decay()
        with torch.no_grad():
            if self.groups_only:
                self._regroup(multipliers)
            else:
                self._remember(multipliers)
            if self.watching:
                self._guard = StepGuard(optimizer, self._own_groups)

    def _regroup(self, multipliers: Mapping[str, float]) -> None:
        """Replace the optimizer's groups by temporary ones, one per rate."""
        optimizer, saved = self.optimizer, self.optimizer.param_groups
        groups: list[ParamGroup] = []
        if self.shared_counter:
            align_counters(optimizer)
        for group in saved:
            by_rate: dict[float, list[Tensor]] = {}
            for tensor in group["params"]:
                for rate, part in self._cut(tensor, group, multipliers):
                    by_rate.setdefault(rate, []).append(part)
            groups += self._derive(group, by_rate)
        self._saved = saved
        optimizer.param_groups = groups
        if self.parallel_list:
            self._saved_list = getattr(optimizer, self.parallel_list)
            setattr(optimizer, self.parallel_list, [{"params": [None] * len(group["params"])} for group in groups])

    def _remember(self, multipliers: Mapping[str, float]) -> None:
        """Keep the optimizer's groups and copy the weights of every scaled range."""
        for group in self.optimizer.param_groups:
            for tensor in group["params"]:
                plan = self.plans.get(id(tensor))
                if plan is not None:
                    self._correct(tensor, plan, multipliers, self._base_decay(tensor, group))

    def _correct(
        self, tensor: Tensor, plan: SegmentPlan, multipliers: Mapping[str, float], decay: float | Tensor | None
    ) -> None:
        """Copy the weights of every scaled range of a tensor that is stepped at the base rate."""
        part = local_part(tensor).detach()
        if len(plan.segments) == 1 and not plan.interleaved:
            self._delta(part, plan.segments[0].rate(multipliers), decay)
            return
        flat = part.view(-1)
        for segment in plan.segments:
            if len(segment.groups) == 1:
                self._delta(flat[segment.lo : segment.hi], segment.rate(multipliers), decay)
        for segment, start, layout in plan.interleaved:
            for name, view in layout.views(flat[segment.lo : segment.hi], start):
                self._delta(view, multipliers.get(name, 1.0), decay)

    def _derive(self, group: ParamGroup, by_rate: Mapping[float, list[Tensor]]) -> list[ParamGroup]:
        """Make temporary groups of one group. Copies values that a step may change in place (counters, lists)."""
        if not by_rate or set(by_rate) == {1.0}:
            return [group]
        kept = {key: value for key, value in group.items() if key != "params"}
        derived = [
            {key: copied(value) for key, value in kept.items()} | {"lr": group["lr"] * rate, "params": parts}
            for rate, parts in by_rate.items()
        ]
        if self.unscaled_decay is not None and _decays(group):
            for rate, one in zip(by_rate, derived, strict=True):
                one["weight_decay"] = group["weight_decay"] / rate
        # An optimizer may count only in groups with a gradient: take the group's new values from such a group.
        stepped = (one for one in derived if any(gradient_of(part) is not None for part in one["params"]))
        source = next(stepped, derived[0])
        self._derived.append(_Derived(group, source, dict(source)))
        return derived

    def _cut(self, tensor: Tensor, group: ParamGroup, multipliers: Mapping[str, float]) -> list[tuple[float, Tensor]]:
        """Return (multiplier, tensor or view) pairs that replace `tensor` of this parameter group in this step."""
        plan = self.plans.get(id(tensor))
        if plan is None or not plan.segments:  # not a model tensor, or empty
            return [(1.0, tensor)]
        if len(plan.segments) == 1 and not plan.interleaved:
            return [(plan.segments[0].rate(multipliers), tensor)]
        runs: list[tuple[int, int, float]] = []
        for segment in plan.segments:
            lo, hi, rate = segment.lo, segment.hi, segment.rate(multipliers)
            if runs and runs[-1][2] == rate:
                runs[-1] = (runs[-1][0], hi, rate)
            else:
                runs.append((lo, hi, rate))
        flat, decay = local_part(tensor).detach().view(-1), self._base_decay(tensor, group)
        stepped = [(runs[0][2], tensor)] if len(runs) == 1 else self._views(tensor, flat, runs)
        if stepped is None:
            self._correct(tensor, plan, multipliers, decay)
            return [(1.0, tensor)]
        for segment, start, layout in plan.interleaved:
            lead = segment.rate(multipliers)
            for name, view in layout.views(flat[segment.lo : segment.hi], start):
                self._delta(view, multipliers.get(name, 1.0) / lead, decay)
        return stepped

    def _delta(self, view: Tensor, scale: float, decay: float | Tensor | None) -> None:
        if scale != 1.0:
            old = view.clone() if decay is None else view * (1 - decay)
            self._deltas.append(_Delta(view, old, scale))

    def _base_decay(self, tensor: Tensor, group: ParamGroup) -> float | Tensor | None:
        """Share of each weight that the step removes at the base rate; None if decay is scaled or absent."""
        if self.unscaled_decay is None or gradient_of(tensor) is None or not _decays(group):
            return None
        return group["lr"] * group["weight_decay"]  # type: ignore[no-any-return]

    def _views(
        self, tensor: Tensor, flat: Tensor, runs: Sequence[tuple[int, int, float]]
    ) -> list[tuple[float, Tensor]] | None:
        """Return views with sliced gradient and state, or None if this optimizer or its state cannot be sliced."""
        state = self.optimizer.state.get(tensor)
        if not (self.elementwise and state and tensor.grad is not None and tensor.is_contiguous()):
            return None
        if not all(sliceable(value, tensor) for value in state.values()):
            return None
        lengths = [hi - lo for lo, hi, _ in runs]
        views = torch.split(flat, lengths)
        sliced = {key: slices_of(value, tensor, lengths) for key, value in state.items()}
        for view, gradient, values in zip(
            views, torch.split(tensor.grad.view(-1), lengths), zip(*sliced.values(), strict=True), strict=True
        ):
            view.grad = gradient
            self.optimizer.state[view] = dict(zip(sliced, values, strict=True))
        self._slices.append(Sliced(tensor, list(views)))
        return [(rate, view) for (_, _, rate), view in zip(runs, views, strict=True)]

    @property
    def _own_groups(self) -> list[ParamGroup]:
        """The optimizer's own parameter groups, also while it has temporary ones."""
        return self.optimizer.param_groups if self._saved is None else self._saved

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        with torch.no_grad():
            for derived in self._derived:
                derived.write_back()
            if self._guard is not None:
                self.problem = self.problem or self._guard.problem(self._own_groups)
            for sliced in self._slices:
                write_back(optimizer, sliced)
            for view, old, scale in self._deltas:
                view.copy_(old.lerp_(view, scale))
        self.restore()


def _decays(group: Mapping[str, Any]) -> bool:
    return bool(group.get("weight_decay"))
