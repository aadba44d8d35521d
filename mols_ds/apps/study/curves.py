"""Curves of a study: mean validation curves, tokens to a loss, SNR over training, rate sensitivity. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from mols_ds.core.json_types import JsonMapping

if TYPE_CHECKING:
    from mols_ds.apps.study.spec import Values

RunResult = JsonMapping
"""Result of one run, as in its JSON file."""


SNR_SERIES = {"effective": "groups", "mean": "mean", "median": "median", "pooled": "pooled"}
"""Estimator -> its key in a run's "snr". "effective": SNR of the mean effective step d, d^2 / (1 - d^2)."""


class Band(NamedTuple):
    """Mean over seeds, with the smallest and largest value."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Curve:
    """Validation loss over training tokens: mean and range over seeds, at the evaluations that all seeds have.

    Infinite from the evaluation at which the first seed diverged.
    """

    tokens: list[int]
    loss: list[Band]

    @property
    def final(self) -> float:
        """Mean at the last evaluation; infinite for an empty curve."""
        return self.loss[-1].mean if self.loss else math.inf


@dataclass(frozen=True, slots=True)
class SnrCurve:
    """SNR of each kind of module group over steps: geometric mean and range over seeds and layers.

    steps[i] belongs to snr[g][i]; None if no seed has a positive reading. dropped[g]: share of readings that were not
    positive and are left out.
    """

    steps: list[int] = field(default_factory=list)
    snr: dict[str, list[Band | None]] = field(default_factory=dict)
    dropped: dict[str, float] = field(default_factory=dict)
    seeds: int = 0


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Mean final loss over tuning seeds at each base rate, best over the other tuned settings; inf: diverged."""

    rates: list[float]
    losses: list[float]
    chosen: float


def final_loss(run: RunResult) -> float:
    """Return the final validation loss in nats per token; infinite if the run diverged."""
    value = run["val_loss"]
    return math.inf if value is None or not math.isfinite(value) else float(value)


def band(values: Sequence[float]) -> Band:
    """Compute the arithmetic mean and range; infinite if a value is."""
    return Band(math.fsum(values) / len(values), min(values), max(values))


def geometric(values: Sequence[float]) -> Band:
    """Compute the geometric mean and range of positive values: halving and doubling count alike, as for multipliers."""
    return Band(math.exp(math.fsum(map(math.log, values)) / len(values)), min(values), max(values))


def validation_curve(runs: Iterable[RunResult]) -> Curve:
    """Compute the mean curve over an arm's seeds. The curve of each seed ends with its final loss."""
    curves = [_points(run) for run in runs]
    if not curves:
        return Curve([], [])
    every = sorted(set().union(*(points for points, _ in curves)))
    tokens: list[int] = []
    loss: list[Band] = []
    for at in every:
        # A diverged run has no further evaluations; it counts as infinite from its end on.
        values = [points.get(at, None if math.isfinite(last) else math.inf) for points, last in curves]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            tokens.append(at)
            loss.append(band(known))
    return Curve(tokens, loss)


def _points(run: RunResult) -> tuple[dict[int, float], float]:
    """Return the evaluations of one run, tokens -> loss, and its final loss."""
    curve = run.get("val_curve") or {}
    values = zip(curve.get("tokens", ()), curve.get("loss", ()), strict=True)
    points = {int(t): math.inf if v is None or not math.isfinite(v) else float(v) for t, v in values}
    last = final_loss(run)
    points.setdefault(int(run["tokens"]), last)
    return points, last


def tokens_to_reach(curve: Curve, target: float) -> float | None:
    """Return the tokens at which the mean curve first reaches `target`, interpolated linearly between evaluations.

    None if it never does. A curve that reaches it at its first evaluation returns the tokens of that evaluation,
    because earlier losses are unknown.
    """
    for i, (tokens, point) in enumerate(zip(curve.tokens, curve.loss, strict=True)):
        if point.mean > target:
            continue
        if i == 0:
            return float(tokens) if tokens > 0 else None
        before, at = curve.loss[i - 1].mean, curve.tokens[i - 1]
        if not math.isfinite(before):
            return float(tokens)
        return at + (tokens - at) * (before - target) / (before - point.mean)
    return None


def sensitivity(losses: Mapping[Values, float], chosen: JsonMapping) -> Sensitivity | None:
    """Compute the loss over rates from every candidate; None if no setting is named `lr`."""
    best: dict[float, float] = {}
    for values, loss in losses.items():
        rate = dict(values).get("lr")
        if isinstance(rate, int | float):
            best[float(rate)] = min(loss, best.get(float(rate), math.inf))
    if not best or "lr" not in chosen:
        return None
    rates = sorted(best)
    return Sensitivity(rates, [best[rate] for rate in rates], float(chosen["lr"]))


def kind_of(group: str) -> str:
    """Return `qk` for `qk` and for `qk.3` (granularity `layer_type`)."""
    return group.split(".", 1)[0]


def snr_curves(runs: Sequence[RunResult]) -> dict[str, SnrCurve]:
    """Return the SNR curves of one arm by estimator; empty if its runs have none."""
    found = {name: snr_curve(runs, key) for name, key in SNR_SERIES.items()}
    return {name: curve for name, curve in found.items() if curve is not None}


def snr_curve(runs: Iterable[RunResult], key: str = "groups") -> SnrCurve | None:
    """Join the readings `run["snr"][key]` of one arm's seeds. Return None if no run has any.

    A logarithmic axis cannot show null, zero or negative readings (no signal above the noise floor). They are left
    out, and their share is kept.
    """
    readings: dict[str, dict[int, list[float]]] = {}
    total: dict[str, int] = {}
    kept: dict[str, int] = {}
    seen: set[int] = set()
    seeds = 0
    for run in runs:
        snr = run.get("snr") or {}
        seeds += bool(snr.get(key))
        for group, values in (snr.get(key) or {}).items():
            kind = kind_of(group)
            for step, value in zip(snr["step"], values, strict=True):
                seen.add(int(step))
                total[kind] = total.get(kind, 0) + 1
                if value is not None and math.isfinite(value) and value > 0:
                    kept[kind] = kept.get(kind, 0) + 1
                    readings.setdefault(kind, {}).setdefault(int(step), []).append(float(value))
    if not seeds:
        return None
    every = sorted(seen)
    return SnrCurve(
        steps=every,
        snr={kind: [geometric(at[step]) if step in at else None for step in every] for kind, at in readings.items()},
        dropped={kind: 1 - kept.get(kind, 0) / count for kind, count in total.items()},
        seeds=seeds,
    )
