"""Decide, for each key of the "mols" section, whether the config or the checkpoint applies when a run resumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mols_ds.core.config import MolsConfig
from mols_ds.core.json_types import JsonObject
from mols_ds.core.phases import Phase
from mols_ds.core.state_check import SINCE

Rule = Literal["config", "begun", "alphas", "elsewhere"]

RULES: dict[str, Rule] = {
    "enabled": "elsewhere",  # if false, `mols_ds.core.off` warns and keeps the state
    "preset": "elsewhere",  # compared through its keys
    "start": "begun",
    "samples": "alphas",
    "max_samples": "alphas",
    "alpha_rtol": "alphas",
    "mode": "alphas",  # `Session.resume` restarts a partial calibration of another mode, with a warning
    "estimator": "alphas",
    "noise_floor_correction": "alphas",
    "unseen_rows": "alphas",
    "reference": "alphas",
    "alpha_min": "alphas",
    "alpha_max": "alphas",
    "factors": "alphas",
    "ramp": "config",
    "ramp_end": "alphas",
    "granularity": "elsewhere",  # `state_check` refuses other module groups
    "rules": "elsewhere",  # the same
    "accumulators": "config",
    "recalibrate": "config",
    "fixed_alphas": "elsewhere",  # the config applies; `Controller.follow_config` warns
    "weight_decay": "config",
    "total_steps": "config",
    "report_dir": "config",
}
"""Key of the "mols" section -> what applies when a run resumes.

config: this run's config. begun: the checkpoint, if its calibration has started. alphas: the checkpoint, if it has
alphas, until a recalibration. elsewhere: other code handles it."""


ADDED: JsonObject = {"factors": None}
"""Keys that checkpoints of 0.4.0 lack -> the value that describes what it did."""


def section_of(config: MolsConfig) -> JsonObject:
    """Return the section as plain JSON values with every key, for a checkpoint."""
    return config.model_dump(mode="json")


def changed(saved: object, config: MolsConfig, phase: Phase) -> tuple[list[str], list[str]]:
    """Describe the settings that differ from the checkpoint's.

    Args:
        saved: `section_of` at the time of saving; None in checkpoints of 0.4.0 and before: compared by `ADDED`.
        config: of this run.
        phase: of the checkpoint.

    Returns:
        (lines for keys where the checkpoint applies, lines for keys where this run's config applies).
    """
    kept: list[str] = []
    applied: list[str] = []
    before = {**ADDED, **saved} if isinstance(saved, Mapping) else ADDED
    begun, over = phase != "waiting", phase in ("ramping", "fixed")
    given = config.fixed_alphas is not None or before.get("fixed_alphas") is not None
    for key, now in section_of(config).items():
        rule = RULES[key]
        if rule == "elsewhere" or key not in before or before[key] == now:
            continue
        if given and rule != "config":  # `Controller.follow_config` warns
            continue
        differs = f"mols.{key} is {now!r} and was {before[key]!r} when the checkpoint was saved"
        if rule == "alphas" and over:
            kept.append(f"{differs}: the checkpoint's alphas stay until a recalibration")
        elif rule == "begun" and begun:
            kept.append(f"{differs}: no effect, the calibration of the checkpoint has started")
        else:
            applied.append(f"{differs}: this run's value applies")
    return kept, applied


def other_mode(saved: Mapping[str, Any], samples: int, mode: str) -> str | None:
    """Return why the samples of a partial calibration cannot be continued in this mode; None if they can."""
    if samples > 0 and saved.get("mode") != mode:
        return f'its samples are of mode "{saved.get("mode")}", this run\'s mode is "{mode}"'
    return None


def reenabled_warning(saved: Mapping[str, Any], t: int) -> str | None:
    """Return a warning for a state that a run with MoLS off kept and that is loaded at step t; None for others."""
    since = saved.get(SINCE)
    if since is None:
        return None
    return (
        f"MoLS was off from step {since} to step {t} and is on again with its state of step {since}: "
        "multipliers jump from 1 to their scheduled values at this step"
    )
