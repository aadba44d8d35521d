"""Another value for every key of the "mols" section, and the message when a run resumes with it."""

from __future__ import annotations

from typing import Any, Literal

Outcome = Literal["kept", "applied", "preset", "refused", "fixed", "off"]

CHANGES: dict[str, tuple[Any, Outcome]] = {
    "enabled": (False, "off"),
    "preset": ("paper", "preset"),
    "start": (1, "kept"),
    "samples": (9, "kept"),
    "max_samples": (64, "kept"),
    "alpha_rtol": (0.2, "kept"),
    "mode": ("online", "kept"),
    "estimator": ("median", "kept"),
    "noise_floor_correction": (True, "kept"),
    "unseen_rows": ("include", "kept"),
    "reference": ("mlp", "kept"),
    "alpha_min": (0.2, "kept"),
    "alpha_max": (20.0, "kept"),
    "factors": ({"embedding": 4.0}, "kept"),
    "ramp": ("cosine", "applied"),
    "ramp_end": (30, "kept"),
    "granularity": ("layer_type", "refused"),
    "rules": ([["norm", "mlp"]], "refused"),
    "accumulators": ({"device": "accelerator"}, "applied"),
    "recalibrate": ({"every": 50}, "applied"),
    "fixed_alphas": ({"mlp": 2.0}, "fixed"),
    "weight_decay": ("unscaled", "applied"),
    "total_steps": (500, "applied"),
    "report_dir": ("elsewhere", "applied"),
}
"""Key -> (value, outcome) after alphas were set in mode "probe".

kept: one warning, the checkpoint applies. applied: one log line, this run applies. preset: its keys are named
one by one. refused: other module groups. fixed: `fixed_alphas` take the alphas' place. off: MoLS is off in this run.
"""


def problem(key: str, warned: list[str], logged: list[str], error: str) -> str:
    """Error in the message about a changed key; "": none.

    Args:
        key: of the section.
        warned: texts of the warnings of the load.
        logged: what was logged meanwhile.
        error: of the load; "" = none.
    """
    outcome = CHANGES[key][1]
    begins = f"mols.{key} is "
    said = {"warned": [w for w in warned if w.startswith(begins)], "logged": [m for m in logged if begins in m]}
    wanted = {"warned": int(outcome == "kept"), "logged": int(outcome == "applied")}
    found = {way: len(lines) for way, lines in said.items()}
    if found != wanted:
        return f"{key}: {found}, wanted {wanted}: {warned} {logged}"
    if (outcome == "refused") != bool(error) or (error and "module groups" not in error):
        return f"{key}: {error or 'loaded'}"
    words = {"preset": "mols.reference is ", "fixed": "mols.fixed_alphas of this run", "off": "is off in this run"}
    if outcome in words and not any(words[outcome] in line for line in warned):
        return f"{key}: {words[outcome]!r} is not in {warned}"
    lines = [line for line in (*warned, error) if "\n" in line]
    return f"{key}: more than one line: {lines}" if lines else ""
