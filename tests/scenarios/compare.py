"""Compares the snapshots of the ranks with those of the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tests.scenarios.scenario import Scenario
from tests.scenarios.snapshot import Snapshot

# Relative tolerances by precision.
ALPHAS = {"fp32": 5e-4, "bf16": 0.1, "fp16": 0.03}  # of each alpha
MEDIAN = 0.011  # alphas of "median": a histogram with bins of 1 %, half of that after the root
MOMENTS = 0.02  # alphas of "moments": rounding may move 1 element of 200 across the lower limit of the variance
WEIGHTS = {"fp32": 1e-3, "bf16": 0.15, "fp16": 0.05}  # of the change of each parameter since the start
BUFFERS = {"fp32": 1e-5, "bf16": 0.03, "fp16": 0.01}
# Megatron-core's weights are compared in 16 bits; with DeepSpeed the fp32 master weights are compared.
ROUNDING = {"fp32": 0.0, "bf16": 2.0**-8, "fp16": 2.0**-11}
EVALUATION = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.01}
UNFROZEN = "weights train that were frozen"
# A function that takes a rank's part of a whole weight, and the rank's actual part.
PartOfWeight = tuple[Callable[[Tensor], Tensor], Tensor]


def differences(scenario: Scenario, expected: Sequence[Snapshot], actual: Sequence[Sequence[Snapshot]]) -> list[str]:
    """Compare all snapshots, and stop at the first action after which one differs.

    Args:
        expected: from the reference, at the start and after each action.
        actual: the same of each rank.

    Returns:
        Lines that name what differs. Empty: nothing differs.
    """
    alpha_tolerance = _alpha_tolerance(scenario)
    for number, wanted in enumerate(expected):
        views = [rank[number] for rank in actual]
        lines = _compare_action(scenario, expected[0], wanted, views, alpha_tolerance)
        if lines:
            what = "the start" if number == 0 else f"action {number}, {scenario.actions[number - 1]}"
            return [f"after {what}:", *lines]
    return []


def _alpha_tolerance(scenario: Scenario) -> float:
    """The largest tolerance that a section of the scenario needs: later alphas depend on earlier ones."""
    settings = scenario.settings
    sections = [settings.section, *(getattr(action, "section", None) for action in scenario.actions)]
    tolerance = ALPHAS[settings.precision]
    for section in sections:
        if section and section["estimator"] == "median":
            tolerance = max(tolerance, MEDIAN)
        if section and section["mode"] == "moments":
            tolerance = max(tolerance, MOMENTS)
    return tolerance


def _compare_action(
    scenario: Scenario, first: Snapshot, wanted: Snapshot, views: Sequence[Snapshot], alpha_tolerance: float
) -> list[str]:
    lines: list[str] = []
    precision = scenario.settings.precision
    if any(view.error or wanted.error for view in views):
        return _compare_errors(wanted, views)
    for rank, view in enumerate(views):
        lines += [f"rank {rank}: {line}" for line in _compare_rank(wanted, view, rank, precision, alpha_tolerance)]
    lines += _compare_warnings(wanted, views)
    if not lines:
        tolerance = max(WEIGHTS[precision], 2 * alpha_tolerance if alpha_tolerance > ALPHAS[precision] else 0.0)
        for view in views:
            parts: dict[str, PartOfWeight] = {
                name: (lambda whole, p=part, n=name: p.of(n, whole), part.values) for name, part in view.parts.items()
            }
            parts |= {name: (lambda whole: whole, weight) for name, weight in view.weights.items()}
            rounding = ROUNDING[precision] if view.parts else 0.0
            lines += _compare_weights(first.weights, wanted.weights, parts, tolerance, rounding)
    return lines


def _compare_errors(wanted: Snapshot, views: Sequence[Snapshot]) -> list[str]:
    if wanted.error and all(view.error.startswith(f"{wanted.error}:") for view in views):
        return []
    return [
        f"rank {rank}: {view.error or 'no error'}, expected {wanted.error or 'none'}" for rank, view in enumerate(views)
    ]


def _compare_rank(wanted: Snapshot, view: Snapshot, rank: int, precision: str, alpha_tolerance: float) -> list[str]:
    lines = []
    for key in ("phase", "samples", "steps", "skipped", "scale", "extra_micro_steps"):
        if getattr(wanted, key) != getattr(view, key):
            lines.append(f"{key} is {getattr(view, key)}, expected {getattr(wanted, key)}")
    if wanted.random[rank] != view.random[0]:
        lines.append("torch's random state differs")
    for key in ("alphas", "rates"):
        lines += _compare_numbers(key, getattr(wanted, key), getattr(view, key), alpha_tolerance)
    lines += _compare_numbers("lr", dict(enumerate(wanted.lrs)), dict(enumerate(view.lrs)), 1e-9)
    drift = alpha_tolerance if alpha_tolerance > ALPHAS[precision] else 0.0  # alphas that differ move the weights
    tolerance = max(BUFFERS[precision], drift)
    for name, buffer in wanted.buffers[rank].items():
        if not torch.allclose(buffer.double(), view.buffers[0][name].double(), rtol=tolerance, atol=tolerance):
            lines.append(f"buffer {name} differs")
    if wanted.eval_losses:
        loss, tolerance = {rank: wanted.eval_losses[rank]}, max(EVALUATION[precision], drift)
        lines += _compare_numbers("evaluation loss", loss, {rank: view.eval_losses[0]}, tolerance)
    return lines


def _compare_numbers(
    what: str, wanted: Mapping[object, float], actual: Mapping[object, float], tolerance: float
) -> list[str]:
    if set(wanted) != set(actual):
        return [f"{what}: keys are {sorted(map(str, actual))}, expected {sorted(map(str, wanted))}"]
    return [
        f"{what} of {key} is {actual[key]!r}, expected {value!r}"
        for key, value in wanted.items()
        if not abs(actual[key] - value) <= tolerance * abs(value)
    ]


def _compare_warnings(wanted: Snapshot, views: Sequence[Snapshot]) -> list[str]:
    """Rank 0 issues all expected warnings. No rank issues another one.

    If one pipeline stage alone holds a weight, that stage issues the warning about it.
    """
    lines = []
    expected = wanted.warnings[0]
    for rank, view in enumerate(views):
        unmatched = list(view.warnings[0])
        for text in expected:
            match = next((message for message in unmatched if text in message), None)
            if match is not None:
                unmatched.remove(match)
            elif rank == 0 and not (
                text == UNFROZEN and any(text in message for v in views for message in v.warnings[0])
            ):
                lines.append(f'no warning "... {text} ..."')
        lines += [f"rank {rank}: unexpected warning: {message}" for message in unmatched]
    return lines


def _compare_weights(
    first: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    parts: Mapping[str, PartOfWeight],
    tolerance: float,
    rounding: float,
) -> list[str]:
    lines = []
    for name, (part_of, actual) in parts.items():
        weight = part_of(wanted[name])
        change = float((weight - part_of(first[name])).norm())
        error = float((actual.double() - weight).norm())
        if not error <= tolerance * change + (rounding + 1e-6) * float(weight.norm()) + 1e-9:
            lines.append(f"weight {name}: error {error:.3g}, change since the start {change:.3g}")
    return lines
