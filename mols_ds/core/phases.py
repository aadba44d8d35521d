"""State machine of the phases waiting -> calibrating -> ramping -> fixed. Pure: no tensors, no engine.

`t` is always the number of optimizer steps so far (DeepSpeed's `global_steps`): the 0-based index of the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from mols_ds.core.config import MolsConfig, SummedRate
from mols_ds.errors import MolsConfigError

Phase = Literal["waiting", "calibrating", "ramping", "fixed", "disabled"]
RateCurve = Callable[[float], Sequence[float] | None]
"""Summed rate over peak rate -> rates of the steps up to there, with the peak; None if unknown (`optim.rate_curve`)."""
FIRST_AUTO_CHECK = 16
"""With samples="auto", check the intervals after this many samples, then whenever the count has doubled."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Calibration start and ramp end, in optimizer steps."""

    start: int
    ramp_end: int
    shape: Literal["linear", "cosine"] = "linear"
    remarks: tuple[str, ...] = ()
    """Warnings: parts of the section that do not fit into the run."""
    summed_rate: float | None = field(default=None, compare=False)
    """Sum of the rates before `start` over the peak rate; None if `start` is not given by it."""

    def fraction(self, t: int, begin: int, end: int) -> float:
        """f(t) of METHOD.md: 0 at `begin`, 1 from `end` on; linear, or (1 - cos(pi x)) / 2, between them."""
        if t >= end:
            return 1.0
        if t <= begin:
            return 0.0
        x = (t - begin) / (end - begin)
        return x if self.shape == "linear" else (1.0 - math.cos(math.pi * x)) / 2.0


def summed_rate_step(summed: float, rates: Sequence[float] | None, warmup_steps: int | None) -> tuple[int, float]:
    """Find the first step where the rates of the steps before it sum up to `summed` times the peak rate.

    Args:
        summed: multiple of the peak rate, above 0.
        rates: rate of each step from the scheduler. None: a linear warm-up, (i + 1) / warmup_steps of the peak in step
            i, then the peak.
        warmup_steps: length of this warm-up; None: every step has the peak rate.

    Returns:
        (the step, the sum of the rates before it in units of the peak rate).
    """
    if rates is None:
        reached = max(1, warmup_steps or 1)
        rates = [min(1.0, (i + 1) / reached) for i in range(reached + math.ceil(summed))]
    peak, total = max(rates), 0.0
    for step, rate in enumerate(rates):
        if total >= summed * peak:
            return step, total / peak
        total += rate
    return len(rates), total / peak


def resolve_schedule(
    config: MolsConfig, total_steps: int | None, warmup_steps: int | None, curve: RateCurve | None = None
) -> Schedule:
    """Convert shares, summed rates and "auto" to steps.

    Args:
        config: the "mols" section.
        total_steps: length of the run by the scheduler, or None. The section's `total_steps` overrides it.
        warmup_steps: warm-up of the scheduler, or None; for `"ramp_end": "auto"`.
        curve: rates of the scheduler, or None; for a `start` by the summed rate.

    Raises:
        MolsConfigError: a share without a known number of steps, "auto" without a known warm-up, start after ramp_end,
            or more samples than steps (modes "online" and "moments").
    """
    total = config.total_steps or total_steps

    def steps(key: str, value: int | float) -> int:
        if isinstance(value, int):
            return value
        if total is None:
            raise MolsConfigError(
                f'"mols.{key}": {value} is a share of all steps, but no scheduler gives their number; '
                f'set "mols.total_steps", or give "mols.{key}" as a step (an integer)'
            )
        return round(value * total)

    summed: float | None = None
    remarks = list(config.without_effect())
    if isinstance(config.start, SummedRate):
        rates = curve(config.start.summed_rate) if curve is not None else None
        start, summed = summed_rate_step(config.start.summed_rate, rates, warmup_steps)
        if rates is None:
            what = "every step with the peak rate" if not warmup_steps else f"a linear warm-up of {warmup_steps} steps"
            remarks.append(
                f'"mols.start": the rates of this scheduler are unknown, so summed_rate counts {what}: step {start}'
            )
    else:
        start = steps("start", config.start)
    if config.ramp_end == "auto":
        if warmup_steps is None:
            raise MolsConfigError(
                '"mols.ramp_end": "auto" reads the scheduler\'s warm-up, but this scheduler has none; '
                "give a share or a step"
            )
        ramp_end = warmup_steps
    else:
        ramp_end = steps("ramp_end", config.ramp_end)
    if isinstance(config.start, SummedRate) and ramp_end <= start:
        remarks.append(
            f'"mols.ramp_end": step {ramp_end} is not after the start, where the summed rate is '
            f"{config.start.summed_rate:g} (step {start}): the ramp ends at step {2 * start} instead"
        )
        ramp_end = 2 * start
    if start > ramp_end or (start == ramp_end and total is not None and start >= total):
        raise MolsConfigError(
            f'"mols.start": step {start} is after "mols.ramp_end" (step {ramp_end}); start earlier or ramp longer'
        )
    if total is not None and start >= total:
        raise MolsConfigError(f'"mols.start": step {start} is past the last of {total} steps; start earlier')
    if total is None:
        return Schedule(start, ramp_end, config.ramp, tuple(remarks), summed)
    _check_window(config, start, total)
    remarks += _remarks(config, start, ramp_end, total)
    return Schedule(start, ramp_end, config.ramp, tuple(remarks), summed)


def _check_window(config: MolsConfig, start: int, total: int) -> None:
    """Raise MolsConfigError if the calibration does not fit into the run. Mode "probe" needs no steps."""
    if config.mode == "probe" or config.fixed_alphas is not None:
        return
    least = f'{FIRST_AUTO_CHECK} ("auto")' if config.samples == "auto" else str(config.samples)
    if start + (FIRST_AUTO_CHECK if config.samples == "auto" else config.samples) > total:
        raise MolsConfigError(
            f'"mols.samples": {least} samples from step {start} on do not fit into {total} steps '
            f'(mode "{config.mode}" takes one a step); take fewer, start earlier or use "mode": "probe"'
        )


def _remarks(config: MolsConfig, start: int, ramp_end: int, total: int) -> Iterator[str]:
    if ramp_end > total:
        yield (
            f'"mols.ramp_end": step {ramp_end} is after the last of {total} steps: the multipliers never reach the '
            "alphas; ramp shorter"
        )
    if config.recalibrate is not None and config.fixed_alphas is None and start + config.recalibrate.every >= total:
        yield (
            f'"mols.recalibrate.every": {config.recalibrate.every} steps after the first calibration (from step '
            f"{start} on) the run of {total} steps is over: nothing is measured again"
        )


@dataclass
class Calibration:
    """Count samples and return the phase of step t. Every rank has an identical copy.

    Attributes:
        samples: usable gradient samples of the current calibration.
        attempts: samples tried, including unusable ones.
        begun_at, ended_at: first and last step of the current or last calibration; None before it.
        ramp_until: last step of the current ramp.
        old: multipliers at the start of the ramp (1 if absent).
        alphas: multipliers at the end of the ramp; empty before the first calibration ends.
    """

    schedule: Schedule
    wanted: int | Literal["auto"]
    max_samples: int
    every: int | None = None
    phase: Phase = "waiting"
    samples: int = 0
    attempts: int = 0
    skipped: int = 0
    begun_at: int | None = None
    ended_at: int | None = None
    ramp_until: int = 0
    old: dict[str, float] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    @property
    def window(self) -> int:
        """Maximum of usable samples of a calibration."""
        return self.max_samples if self.wanted == "auto" else self.wanted

    def due(self, t: int) -> bool:
        """Whether a calibration starts before step t."""
        if self.phase == "waiting":
            return t >= self.schedule.start
        if self.phase == "fixed" and self.every is not None and self.ended_at is not None:
            return t >= self.ended_at + self.every
        return False

    def begin(self, t: int) -> None:
        """Start a calibration before step t. Multipliers of an earlier one stay during it."""
        self.old = self.multipliers(t)
        self.phase, self.begun_at = "calibrating", t
        self.samples = self.attempts = self.skipped = 0

    def count(self, usable: bool) -> None:
        """Count one sample; `usable` must be the same on every rank."""
        self.attempts += 1
        self.samples += usable
        self.skipped += not usable

    def check_due(self) -> bool:
        """Whether to check the intervals now (samples="auto")."""
        n = self.samples
        return self.wanted == "auto" and n >= FIRST_AUTO_CHECK and (n & (n - 1)) == 0

    def exhausted(self) -> Literal["no", "complete", "failed"]:
        """ "complete" with all samples; "failed" after `window` attempts without any, or 2 x `window` attempts."""
        if self.samples >= self.window:
            return "complete"
        if self.attempts >= self.window and self.samples == 0:
            return "failed"
        return "failed" if self.attempts >= 2 * self.window else "no"

    def end(self, t: int, alphas: dict[str, float]) -> bool:
        """Set the alphas before step t and start the ramp.

        Returns:
            False if the planned end of the ramp is past and was moved.
        """
        planned = self.schedule.ramp_end
        in_time = planned >= t
        length = max(1, planned - self.schedule.start)
        self.alphas, self.ended_at = dict(alphas), t
        self.ramp_until = planned if in_time else t + length
        self.phase = "ramping"
        self.advance(t)
        return in_time

    def advance(self, t: int) -> None:
        """Change from ramping to fixed when the ramp has ended before step t."""
        if self.phase == "ramping" and t >= self.ramp_until:
            self.phase = "fixed"

    def multipliers(self, t: int) -> dict[str, float]:
        """lr_m(t) / lr(t) of step t: old + (alpha - old) * f(t). METHOD.md's 1 + (alpha - 1) f(t) the first time."""
        if self.phase in ("waiting", "disabled"):
            return {}
        if self.phase == "calibrating" or self.ended_at is None:
            return dict(self.old)
        f = self.schedule.fraction(t, self.ended_at, self.ramp_until)
        old = {group: self.old.get(group, 1.0) for group in self.alphas}
        return {g: alpha if f == 1.0 else old[g] + (alpha - old[g]) * f for g, alpha in self.alphas.items()}

    def state_dict(self) -> dict[str, object]:
        """Return all fields but the schedule and the limits, which come from the config of the resumed run."""
        state = asdict(self)
        for key in ("schedule", "wanted", "max_samples", "every"):
            del state[key]
        return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Load a `state_dict`. Unknown keys raise KeyError."""
        for key in self.state_dict():
            setattr(self, key, state[key])
