"""When a config's calibration and ramp happen, against the learning rate's schedule. Engine-free."""

from __future__ import annotations

from dataclasses import dataclass

from mols_ds.apps.doctor.findings import Findings
from mols_ds.core.config import MolsConfig
from mols_ds.core.phases import Schedule, resolve_schedule
from mols_ds.errors import MolsError

PROBE_SHARE = 1 / 3
"""Extra forward and backward passes, as a share of the run's, from which on the doctor warns. The paper's runs pay
32 / 10,000 and less (arXiv 2605.05794, section 4)."""
DEFAULT_FIX = "docs/config.md lists every key of the section with what is allowed"


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run.

    Attributes:
        steps: optimizer steps of it, None where nothing tells.
        warmup: warm-up steps of the rate's schedule, None where nothing tells.
        sequences: of a global batch.
        passes: forward and backward passes of a rank in one step (gradient accumulation).
        fp16_scale_power: with a dynamic fp16 loss scale, the power of two that it starts from; else None.
    """

    steps: int | None
    warmup: int | None
    sequences: int
    passes: int
    fp16_scale_power: int | None = None


def check_schedule(findings: Findings, config: MolsConfig, run: RunFacts) -> None:
    """Findings on start, window, ramp and cost of the "mols" section `config`."""
    if not config.enabled:
        findings.add("note", "config.mols", '"enabled" is false: the engine is stock and nothing is measured')
        return
    unknown = config.total_steps is None and run.steps is None
    shares = [key for key in ("start", "ramp_end") if isinstance(getattr(config, key), float)]
    if unknown and shares:
        findings.add(
            "warning",
            "config.total_steps",
            f"{' and '.join(shares)} are shares of all steps, and nothing here tells how many there are",
            'set "mols.total_steps" (train.py fills in its --steps); mols-ds doctor --steps N checks the rest',
        )
        return
    if run.steps is not None and config.total_steps is not None and run.steps != config.total_steps:
        findings.add(
            "warning",
            "config.total_steps",
            f'"mols.total_steps" is {config.total_steps}, and the run has {run.steps} steps: shares are of the former',
            "give both the same number, or leave total_steps out",
        )
    try:
        schedule = resolve_schedule(config, run.steps, run.warmup)
    except MolsError as error:
        findings.refused("config.schedule", error, DEFAULT_FIX)
        return
    findings.add("ok", "config.schedule", f"calibration from step {schedule.start}, ramp to step {schedule.ramp_end}")
    _ramp(findings, config, schedule, run)
    if config.fixed_alphas is None:
        _window(findings, config, schedule, run)
        _cost(findings, config, run)
        _loss_scale(findings, config, schedule, run)
    _again(findings, config, schedule)


def _window_of(config: MolsConfig) -> int:
    """Gradient samples of a calibration at most."""
    return config.max_samples if config.samples == "auto" else config.samples


def _ramp(findings: Findings, config: MolsConfig, schedule: Schedule, run: RunFacts) -> None:
    if schedule.ramp_end == schedule.start:
        found = f"start and ramp_end are both step {schedule.start}: the multipliers jump instead of ramping"
        findings.add("warning", "config.ramp", found, "set ramp_end to the end of the warm-up")
    if run.warmup is not None and schedule.ramp_end > run.warmup:
        findings.add(
            "note",
            "config.ramp",
            f"the ramp ends at step {schedule.ramp_end}, after the warm-up (step {run.warmup}): multipliers still move "
            "at the peak rate (the paper ends both together)",
            '"ramp_end": "auto" takes the warm-up of a scheduler that tells it',
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
            f"warm-up (step {limit}): the weights move at the full rate while they are measured, which came out as the "
            "worst arms in docs/evidence/results.md, and the ramp is put off",
            f'"mode": "probe"; or a warm-up and ramp_end of at least {end} steps, or fewer samples',
        )
    else:
        found = f'mode "{config.mode}" measures steps {schedule.start} to {end} of {limit} of warm-up while they train'
        findings.add("note", "config.mode", found, '"probe" is what docs/evidence/results.md finds best')


def _cost(findings: Findings, config: MolsConfig, run: RunFacts) -> None:
    if config.mode != "probe":
        return
    window = _window_of(config)
    most = "at most " if config.samples == "auto" else ""
    found = (
        f"the calibration costs {most}{window} global batches without an update: {window * run.passes} forward and "
        f"backward passes a rank ({window * run.sequences:,} sequences)"
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
        f"fp16 with a dynamic loss scale from 2^{power}, and a probe at step {schedule.start}: until the scale is "
        f"low enough (at most {power} overflows, each a step) samples overflow, and in the window nothing lowers it",
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
            f"every {config.recalibrate.every} steps a calibration is due, and a ramp takes {ramp}: multipliers are "
            "never constant",
            "recalibrate after several times the ramp's length, or not at all",
        )
