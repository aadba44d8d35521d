"""Step time and memory of an arm relative to the baseline. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import NamedTuple

from mols_ds.core.json_types import JsonMapping

PARTS = ("weights", "gradients", "optimizer")

Runs = Mapping[int, JsonMapping]
"""Evaluation runs of an arm on one model: seed -> result."""


class RelativeCost(NamedTuple):
    """Step time and memory relative to the baseline. None: unknown.

    step: median and quartiles of the paired ratios; step_seconds: of the arm. memory_bytes, memory_ratio: as `how`
    describes. accumulators: further bytes of MoLS during the measurement. in_turns: True if both engines took turns;
    False if the times are from the runs themselves, where other work on the machine makes them unreliable.
    """

    step: tuple[float, float, float] | None
    step_seconds: float | None
    memory_bytes: float | None
    memory_ratio: float | None
    accumulators: float | None
    how: str
    in_turns: bool


def relative_cost(measured: JsonMapping | None, runs: Runs, baseline: Runs) -> RelativeCost:
    """Return the measured cost if there is one, else estimate it from the runs of both arms, paired by seed."""
    if not measured:
        return _from_runs(runs, baseline)
    ratio = measured.get("step_ratio")
    return RelativeCost(
        step=(float(ratio[0]), float(ratio[1]), float(ratio[2])) if ratio else None,
        step_seconds=measured.get("step_seconds"),
        memory_bytes=measured.get("memory_bytes"),
        memory_ratio=measured.get("memory_ratio"),
        accumulators=measured.get("accumulators"),
        how=str(measured.get("memory_how") or ""),
        in_turns=True,
    )


def _from_runs(runs: Runs, baseline: Runs) -> RelativeCost:
    seconds = {seed: run.get("step_seconds") for seed, run in runs.items()}
    known = [value for value in seconds.values() if value is not None]
    peaks = all(memory_bytes(run, True) is not None for run in [*runs.values(), *baseline.values()])
    sizes = {seed: memory_bytes(run, peaks) for seed, run in runs.items()}
    memory = ratios(sizes, {seed: memory_bytes(run, peaks) for seed, run in baseline.items()})
    found = [value for value in sizes.values() if value is not None]
    held = [value for run in runs.values() if (value := (run.get("memory") or {}).get("accumulators")) is not None]
    how = "peak of the process" if peaks else "weights, gradients and optimizer state"
    return RelativeCost(
        step=ratios(seconds, {seed: run.get("step_seconds") for seed, run in baseline.items()}),
        step_seconds=statistics.median(known) if known else None,
        memory_bytes=statistics.median(found) if found else None,
        memory_ratio=memory[0] if memory else None,
        accumulators=max(held) if held else None,
        how=how if found else "",
        in_turns=False,
    )


def memory_bytes(run: JsonMapping, peak: bool) -> float | None:
    """Return a run's peak bytes, or the sum of weights, gradients and optimizer state; None if unknown."""
    memory = run.get("memory") or {}
    parts = [memory.get(part) for part in (("peak",) if peak else PARTS)]
    known = [float(part) for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def ratios(mine: Mapping[int, float | None], theirs: Mapping[int, float | None]) -> tuple[float, float, float] | None:
    """Return median and quartiles of the ratios at common keys (seeds); None without any."""
    pairs = [(value, theirs[key]) for key, value in mine.items() if key in theirs]
    found = [a / b for a, b in pairs if a is not None and b]
    if not found:
        return None
    if len(found) == 1:
        return found[0], found[0], found[0]
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return middle, low, high
