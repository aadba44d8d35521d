"""Is what the ranks saw what the twin told?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tests.lives.actions import Life
from tests.lives.seen import Seen

# Relative errors. alphas: of each; "median" reads a histogram with bins of 1 % (half of it in the root), "moments" has
# a cut at which an element of 200 may be on either side. weights: of the movement of each parameter since the start.
ALPHAS = {"fp32": 5e-4, "bf16": 0.1, "fp16": 0.03}
MEDIAN, MOMENTS = 0.011, 0.02
WEIGHTS = {"fp32": 1e-3, "bf16": 0.15, "fp16": 0.05}
BUFFERS = {"fp32": 1e-5, "bf16": 0.03, "fp16": 0.01}
ROUNDING = {
    "fp32": 0.0,
    "bf16": 2.0**-8,
    "fp16": 2.0**-11,
}  # of Megatron's 16-bit weights; DeepSpeed's masters are read
EVALUATED = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.01}
UNFROZEN = "weights train that were frozen"
Cut = tuple[Callable[[Tensor], Tensor], Tensor]  # how a whole weight is cut to a rank's part, and that part


def differences(life: Life, told: Sequence[Seen], ranks: Sequence[Sequence[Seen]]) -> list[str]:
    """In words, of the first action at which something differs; empty = nothing does."""
    loose = _loosest(life)
    for number, wanted in enumerate(told):
        views = [rank[number] for rank in ranks]
        found = _of_action(life, told[0], wanted, views, loose)
        if found:
            what = "the start" if number == 0 else f"action {number}, {life.actions[number - 1]}"
            return [f"after {what}:", *found]
    return []


def _loosest(life: Life) -> float:
    """Of the alphas' tolerances that the sections of this life call for: a later alpha rests on a former one."""
    setting = life.setting
    sections = [setting.section, *(getattr(action, "section", None) for action in life.actions)]
    tolerance = ALPHAS[setting.precision]
    for section in sections:
        if section and section["estimator"] == "median":
            tolerance = max(tolerance, MEDIAN)
        if section and section["mode"] == "moments":
            tolerance = max(tolerance, MOMENTS)
    return tolerance


def _of_action(life: Life, first: Seen, wanted: Seen, views: Sequence[Seen], loose: float) -> list[str]:
    found: list[str] = []
    precision = life.setting.precision
    if any(view.error or wanted.error for view in views):
        return _errors(wanted, views)
    for rank, view in enumerate(views):
        found += [f"rank {rank}: {line}" for line in _plain(wanted, view, rank, precision, loose)]
    found += _said(wanted, views)
    if not found:
        weights = max(WEIGHTS[precision], 2 * loose if loose > ALPHAS[precision] else 0.0)
        for view in views:
            cut = {
                name: (lambda whole, p=part, n=name: p.of(n, whole), part.values) for name, part in view.parts.items()
            }
            cut |= {name: (lambda whole: whole, weight) for name, weight in view.weights.items()}
            rounding = ROUNDING[precision] if view.parts else 0.0
            found += _weights(first.weights, wanted.weights, cut, weights, rounding)
    return found


def _errors(wanted: Seen, views: Sequence[Seen]) -> list[str]:
    if wanted.error and all(view.error.startswith(f"{wanted.error}:") for view in views):
        return []
    return [f"rank {rank}: {view.error or 'no error'}, not {wanted.error or 'none'}" for rank, view in enumerate(views)]


def _plain(wanted: Seen, view: Seen, rank: int, precision: str, loose: float) -> list[str]:
    found = []
    for key in ("phase", "samples", "steps", "skipped", "scale", "extra_micros"):
        if getattr(wanted, key) != getattr(view, key):
            found.append(f"{key} is {getattr(view, key)}, not {getattr(wanted, key)}")
    if wanted.random[rank] != view.random[0]:
        found.append("torch's random state is another")
    for key, tolerance in (("alphas", loose), ("rates", loose)):
        found += _numbers(key, getattr(wanted, key), getattr(view, key), tolerance)
    found += _numbers("lr", dict(enumerate(wanted.lrs)), dict(enumerate(view.lrs)), 1e-9)
    drift = loose if loose > ALPHAS[precision] else 0.0  # of weights that other alphas have moved
    near = max(BUFFERS[precision], drift)
    for name, buffer in wanted.buffers[rank].items():
        if not torch.allclose(buffer.double(), view.buffers[0][name].double(), rtol=near, atol=near):
            found.append(f"buffer {name} is another")
    if wanted.evaluated:
        evaluated = {rank: view.evaluated[0]}
        found += _numbers("evaluation", {rank: wanted.evaluated[rank]}, evaluated, max(EVALUATED[precision], drift))
    return found


def _numbers(what: str, wanted: Mapping[object, float], seen: Mapping[object, float], tolerance: float) -> list[str]:
    if set(wanted) != set(seen):
        return [f"{what}: of {sorted(map(str, seen))}, not of {sorted(map(str, wanted))}"]
    return [
        f"{what} of {key} is {seen[key]!r}, not {value!r}"
        for key, value in wanted.items()
        if not abs(seen[key] - value) <= tolerance * abs(value)
    ]


def _said(wanted: Seen, views: Sequence[Seen]) -> list[str]:
    """Rank 0 says all that is due, and nothing else; the others say nothing that is not due.

    Of a weight that a pipeline stage holds alone, that stage speaks.
    """
    found = []
    due = wanted.said[0]
    for rank, view in enumerate(views):
        left = list(view.said[0])
        for short in due:
            match = next((line for line in left if short in line), None)
            if match is not None:
                left.remove(match)
            elif rank == 0 and not (short == UNFROZEN and any(short in line for v in views for line in v.said[0])):
                found.append(f'no warning "... {short} ..."')
        found += [f"rank {rank}: a warning that is not due: {line}" for line in left]
    return found


def _weights(
    first: Mapping[str, Tensor], wanted: Mapping[str, Tensor], cut: Mapping[str, Cut], tolerance: float, rounding: float
) -> list[str]:
    found = []
    for name, (part_of, seen) in cut.items():
        weight = part_of(wanted[name])
        moved = float((weight - part_of(first[name])).norm())
        error = float((seen.double() - weight).norm())
        if not error <= tolerance * moved + (rounding + 1e-6) * float(weight.norm()) + 1e-9:
            found.append(f"weight {name} is off by {error:.3g}; it moved by {moved:.3g}")
    return found
