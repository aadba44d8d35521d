"""Who wins where a run resumes with other settings than the checkpoint was saved with: one table, said key by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mols_ds.core.config import MolsConfig
from mols_ds.core.json_types import JsonObject
from mols_ds.core.phases import Phase
from mols_ds.core.state_check import SINCE

Rule = Literal["config", "begun", "alphas", "elsewhere"]

RULES: dict[str, Rule] = {
    "enabled": "elsewhere",  # off: the state is kept and said (`mols_ds.core.off`)
    "preset": "elsewhere",  # its keys are compared
    "start": "begun",
    "samples": "alphas",
    "max_samples": "alphas",
    "alpha_rtol": "alphas",
    "mode": "alphas",  # a half-done calibration of another mode starts over, which is said there
    "estimator": "alphas",
    "noise_floor_correction": "alphas",
    "reference": "alphas",
    "alpha_min": "alphas",
    "alpha_max": "alphas",
    "ramp": "config",
    "ramp_end": "alphas",
    "granularity": "elsewhere",  # other module groups are refused (`state_check`)
    "rules": "elsewhere",  # the same
    "accumulators": "config",
    "recalibrate": "config",
    "fixed_alphas": "elsewhere",  # the config wins, which `Controller.follow_config` says
    "weight_decay": "config",
    "total_steps": "config",
    "report_dir": "config",
}
"""Key of the "mols" section -> who wins at resume.

config: this run's config. begun: the checkpoint once the calibration has begun. alphas: the checkpoint once there are
alphas, until a recalibration. elsewhere: nothing to say here."""


def section_of(config: MolsConfig) -> JsonObject:
    """The section as plain JSON values, every key named: what a checkpoint holds of it."""
    return config.model_dump(mode="json")


def changed(saved: object, config: MolsConfig, phase: Phase) -> tuple[list[str], list[str]]:
    """What to say of settings that differ from a checkpoint's.

    Args:
        saved: what `section_of` gave when the checkpoint was saved; None in checkpoints of 0.4.0 and before.
        config: of this run.
        phase: of the checkpoint.

    Returns:
        (lines for the keys of which the checkpoint wins, lines for those of which this run's config wins).
    """
    kept: list[str] = []
    applied: list[str] = []
    if not isinstance(saved, Mapping):
        return kept, applied
    begun, over = phase != "waiting", phase in ("ramping", "fixed")
    given = config.fixed_alphas is not None or saved.get("fixed_alphas") is not None
    for key, now in section_of(config).items():
        rule = RULES[key]
        if rule == "elsewhere" or key not in saved or saved[key] == now:
            continue
        if given and rule != "config":  # nothing is measured: `Controller.follow_config` says what applies
            continue
        differs = f"mols.{key} is {now!r} and was {saved[key]!r} when the checkpoint was saved"
        if rule == "alphas" and over:
            kept.append(f"{differs}: the checkpoint's alphas stay as they are, until a recalibration")
        elif rule == "begun" and begun:
            kept.append(f"{differs}: the calibration of the checkpoint has begun already, so it changes nothing")
        else:
            applied.append(f"{differs}: this run's value applies")
    return kept, applied


def on_again(saved: Mapping[str, Any], t: int) -> str | None:
    """What to say of a state that was kept in a run with MoLS off and is loaded at step t; None for any other state."""
    since = saved.get(SINCE)
    if since is None:
        return None
    return (
        f"MoLS was off from step {since} to step {t}, and is on again: what it had at step {since} goes on, so that "
        "multipliers jump from 1 to where the schedule puts them at this step"
    )
