"""The phases waiting -> calibrating -> ramping -> fixed as a pure state machine: no tensors, no engine.

`t` is everywhere the number of optimizer steps taken so far (DeepSpeed's `global_steps`), i.e. the 0-based index of the
step that comes next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from mols_ds.core.config import MolsConfig
from mols_ds.errors import MolsConfigError

Phase = Literal["waiting", "calibrating", "ramping", "fixed", "disabled"]
FIRST_AUTO_CHECK = 16
"""samples="auto" first looks at the intervals after this many samples, then each time the count has doubled."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When things happen, in optimizer steps: calibration from `start`, ramp over by `ramp_end`."""

    start: int
    ramp_end: int
    shape: Literal["linear", "cosine"] = "linear"
    remarks: tuple[str, ...] = ()
    """What of the section will not happen within the run, a line each."""

    def fraction(self, t: int, begin: int, end: int) -> float:
        """f(t) of METHOD.md: 0 at `begin`, 1 from `end` on, between them linear or (1 - cos(pi x)) / 2."""
        if t >= end:
            return 1.0
        if t <= begin:
            return 0.0
        x = (t - begin) / (end - begin)
        return x if self.shape == "linear" else (1.0 - math.cos(math.pi * x)) / 2.0


def resolve_schedule(config: MolsConfig, total_steps: int | None, warmup_steps: int | None) -> Schedule:
    """Turn shares and "auto" into steps.

    Args:
        total_steps: from the scheduler, where it tells; the section's own `total_steps` wins.
        warmup_steps: from the scheduler, for `"ramp_end": "auto"`.

    Raises:
        MolsConfigError: a share without a known number of steps, "auto" without a known warm-up, start after ramp_end,
            more samples than there are steps (modes "online" and "moments").
    """
    total = config.total_steps or total_steps

    def steps(key: str, value: int | float) -> int:
        if isinstance(value, int):
            return value
        if total is None:
            raise MolsConfigError(
                f'"mols.{key}": {value} is a share of all steps, but no scheduler tells how many there are; '
                f'set "mols.total_steps", or give "mols.{key}" as a step (an integer)'
            )
        return round(value * total)

    start = steps("start", config.start)
    if config.ramp_end == "auto":
        if warmup_steps is None:
            raise MolsConfigError(
                '"mols.ramp_end": "auto" reads the scheduler\'s warm-up, but this scheduler does not tell one; '
                "give a share or a step"
            )
        ramp_end = warmup_steps
    else:
        ramp_end = steps("ramp_end", config.ramp_end)
    if start > ramp_end or (start == ramp_end and total is not None and start >= total):
        raise MolsConfigError(
            f'"mols.start": step {start} lies after "mols.ramp_end" (step {ramp_end}); start earlier or ramp longer'
        )
    if total is not None and start >= total:
        raise MolsConfigError(f'"mols.start": step {start} lies past the last of {total} steps; nothing would happen')
    if total is None:
        return Schedule(start, ramp_end, config.ramp)
    _check_window(config, start, total)
    return Schedule(start, ramp_end, config.ramp, tuple(_remarks(config, start, ramp_end, total)))


def _check_window(config: MolsConfig, start: int, total: int) -> None:
    """Raise MolsConfigError where the calibration cannot end within the run. Mode "probe" takes no steps of it."""
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
            f'"mols.ramp_end": step {ramp_end} lies after the last of {total} steps: the multipliers never reach the '
            "alphas; ramp shorter"
        )
    if config.recalibrate is not None and config.fixed_alphas is None and start + config.recalibrate.every >= total:
        yield (
            f'"mols.recalibrate.every": {config.recalibrate.every} steps after the first calibration (from step '
            f"{start} on) the run of {total} steps is over: nothing is measured again"
        )


@dataclass
class Calibration:
    """Counts samples and says in which phase step t lies. Every rank runs an identical copy.

    Attributes:
        samples: usable gradient samples taken in the current calibration.
        attempts: samples tried, the left-out ones included.
        begun_at, ended_at: steps of the current or last calibration, None before it.
        ramp_until: step at which the current ramp is over.
        old: multipliers at the end of the calibration (1 where absent), where the ramp begins.
        alphas: multipliers at which it ends; empty before they exist.
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
        """Usable samples after which the calibration ends at the latest."""
        return self.max_samples if self.wanted == "auto" else self.wanted

    def due(self, t: int) -> bool:
        """Whether a calibration should begin now, before step t."""
        if self.phase == "waiting":
            return t >= self.schedule.start
        if self.phase == "fixed" and self.every is not None and self.ended_at is not None:
            return t >= self.ended_at + self.every
        return False

    def begin(self, t: int) -> None:
        """Open a calibration before step t; the multipliers of a former one stay as they are meanwhile."""
        self.old = self.multipliers(t)
        self.phase, self.begun_at = "calibrating", t
        self.samples = self.attempts = self.skipped = 0

    def count(self, usable: bool) -> None:
        """Count one attempted sample; `usable` must be the same on every rank."""
        self.attempts += 1
        self.samples += usable
        self.skipped += not usable

    def check_due(self) -> bool:
        """Whether the intervals should be looked at now (samples="auto" only)."""
        n = self.samples
        return self.wanted == "auto" and n >= FIRST_AUTO_CHECK and (n & (n - 1)) == 0

    def exhausted(self) -> Literal["no", "complete", "failed"]:
        """Complete with all samples; failed after `window` attempts without any, or 2 x `window` attempts in all."""
        if self.samples >= self.window:
            return "complete"
        if self.attempts >= self.window and self.samples == 0:
            return "failed"
        return "failed" if self.attempts >= 2 * self.window else "no"

    def end(self, t: int, alphas: dict[str, float]) -> bool:
        """Set the alphas before step t and start the ramp.

        Returns False where the ramp had to be moved because the planned end of it is already past.
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
        """Move from ramping to fixed when the ramp is over before step t."""
        if self.phase == "ramping" and t >= self.ramp_until:
            self.phase = "fixed"

    def multipliers(self, t: int) -> dict[str, float]:
        """lr_m(t) / lr(t) for step t: old + (alpha - old) * f(t); METHOD.md's 1 + (alpha - 1) f(t) the first time."""
        if self.phase in ("waiting", "disabled"):
            return {}
        if self.phase == "calibrating" or self.ended_at is None:
            return dict(self.old)
        f = self.schedule.fraction(t, self.ended_at, self.ramp_until)
        old = {group: self.old.get(group, 1.0) for group in self.alphas}
        return {g: alpha if f == 1.0 else old[g] + (alpha - old[g]) * f for g, alpha in self.alphas.items()}

    def state_dict(self) -> dict[str, object]:
        """Everything but the schedule and the limits, which the config of the resumed run gives anew."""
        state = asdict(self)
        for key in ("schedule", "wanted", "max_samples", "every"):
            del state[key]
        return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Inverse of `state_dict`; unknown keys raise KeyError."""
        for key in self.state_dict():
            setattr(self, key, state[key])
