"""Compare the calibration and ramp of a config with the learning rate schedule. Needs no engine."""

from __future__ import annotations

from dataclasses import dataclass

from mols_ds.apps.doctor.findings import Findings
from mols_ds.core.config import MolsConfig
from mols_ds.core.phases import Schedule, resolve_schedule
from mols_ds.errors import MolsError

PROBE_SHARE = 1 / 3
"""Warn if the calibration needs more than this share of the run's forward and backward passes. The paper's runs use at
most 32 / 10,000 (arXiv 2605.05794, section 4)."""
DEFAULT_FIX = "docs/config.md lists every key of the section with its allowed values"


@dataclass(frozen=True)
class RunFacts:
    """Known facts of a run.

    Attributes:
        steps: optimizer steps; None if unknown.
        warmup: warm-up steps of the learning rate schedule; None if unknown.
        sequences: sequences per global batch.
        passes: forward and backward passes per rank and step (gradient accumulation).
        fp16_scale_power: initial power of two of a dynamic fp16 loss scale; else None.
    """

    steps: int | None
    warmup: int | None
    sequences: int
    passes: int
    fp16_scale_power: int | None = None


def check_schedule(findings: Findings, config: MolsConfig, run: RunFacts) -> None:
    """Check start, window, ramp and cost of the "mols" section `config`."""
    if not config.enabled:
        findings.add("note", "config.mols", '"enabled" is false: stock engine, no measurement')
        return
    unknown = config.total_steps is None and run.steps is None
    shares = [key for key in ("start", "ramp_end") if isinstance(getattr(config, key), float)]
    if unknown and shares:
        findings.add(
            "warning",
            "config.total_steps",
            f"{' and '.join(shares)} are shares of all steps, and the number of steps is unknown",
            'set "mols.total_steps" (train.py fills in its --steps); mols-ds doctor --steps N checks the rest',
        )
        return
    if run.steps is not None and config.total_steps is not None and run.steps != config.total_steps:
        findings.add(
            "warning",
            "config.total_steps",
            f'"mols.total_steps" is {config.total_steps}, but the run has {run.steps} steps: shares use the former',
            "set both to one value, or leave total_steps out",
        )
    try:
        schedule = resolve_schedule(config, run.steps, run.warmup)
    except MolsError as error:
        findings.refused("config.schedule", error, DEFAULT_FIX)
        return
    findings.add("ok", "config.schedule", f"calibration from step {schedule.start}, ramp to step {schedule.ramp_end}")
    _ramp(findings, schedule, run)
    if config.fixed_alphas is None:
        _window(findings, config, schedule, run)
        _cost(findings, config, run)
        _loss_scale(findings, config, schedule, run)
    _again(findings, config, schedule)


def _window_of(config: MolsConfig) -> int:
    """Return the largest number of gradient samples of a calibration."""
    return config.max_samples if config.samples == "auto" else config.samples


def _ramp(findings: Findings, schedule: Schedule, run: RunFacts) -> None:
    if schedule.ramp_end == schedule.start:
        found = f"start and ramp_end are both step {schedule.start}: the multipliers jump instead of ramping"
        findings.add("warning", "config.ramp", found, "set ramp_end to the end of the warm-up")
    if run.warmup is not None and schedule.ramp_end > run.warmup:
        findings.add(
            "note",
            "config.ramp",
            f"the ramp ends at step {schedule.ramp_end}, after the warm-up (step {run.warmup}): multipliers still "
            "change at the peak rate (the paper ends both together)",
            '"ramp_end": "auto" takes the warm-up of the scheduler, if it has one',
        )
    if run.warmup is not None and schedule.start >= run.warmup > 0:
        found = f"the calibration starts at step {schedule.start}, when the warm-up (step {run.warmup}) is over"
        findings.add("warning", "config.start", found, "start at about 1 % of the run, inside the warm-up")


def _window(findings: Findings, config: MolsConfig, schedule: Schedule, run: RunFacts) -> None:
    if config.mode == "probe":
        return
    end = schedule.start + _window_of(config)
    limit = schedule.ramp_end if run.warmup is None else min(schedule.ramp_end, run.warmup)
    if end > limit:
        findings.add(
            "warning",
            "config.mode",
            f'mode "{config.mode}" measures the training steps {schedule.start} to {end}, past the end of ramp or '
            f"warm-up (step {limit}): the weights change at the full rate during the measurement (the worst arms in "
            "docs/evidence/results.md), and the ramp starts later",
            f'"mode": "probe"; or a warm-up and ramp_end of at least {end} steps, or fewer samples',
        )
    else:
        found = f'mode "{config.mode}" measures steps {schedule.start} to {end} of {limit} of warm-up while they train'
        findings.add("note", "config.mode", found, '"probe" is the best mode in docs/evidence/results.md')


def _cost(findings: Findings, config: MolsConfig, run: RunFacts) -> None:
    if config.mode != "probe":
        return
    window = _window_of(config)
    most = "at most " if config.samples == "auto" else ""
    found = (
        f"the calibration costs {most}{window} global batches without an update: {window * run.passes} forward and "
        f"backward passes per rank ({window * run.sequences:,} sequences)"
    )
    steps = config.total_steps or run.steps
    share = window / steps if steps else 0.0
    if steps:
        found += f", {share:.1%} of the run's"
    fix = "fewer samples (at least 8 for the intervals), or a longer run" if share > PROBE_SHARE else ""
    findings.add("warning" if share > PROBE_SHARE else "ok", "config.cost", found, fix)


def _loss_scale(findings: Findings, config: MolsConfig, schedule: Schedule, run: RunFacts) -> None:
    power = run.fp16_scale_power
    if power is None or config.mode != "probe" or schedule.start >= power:
        return
    findings.add(
        "warning",
        "config.fp16",
        f"fp16 with a dynamic loss scale from 2^{power}, and a probe at step {schedule.start}: samples overflow until "
        f"the scale is low enough (at most {power} overflows, one per step), and nothing lowers it inside the window",
        f'"start" of {power} steps or later, a lower "initial_scale_power", or bf16',
    )


def _again(findings: Findings, config: MolsConfig, schedule: Schedule) -> None:
    if config.recalibrate is None:
        return
    ramp = schedule.ramp_end - schedule.start
    if config.recalibrate.every <= ramp:
        findings.add(
            "warning",
            "config.recalibrate",
            f"a calibration every {config.recalibrate.every} steps, and a ramp of {ramp}: the multipliers are never "
            "constant",
            "recalibrate at intervals of several ramps, or not at all",
        )
