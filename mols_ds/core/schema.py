"""Schema of the calibration report (`mols_report.json`), and its check.

The report is a plain dict: any tool can read the file without this package.

    {"schema": 1, "step": int, "samples": int, "mode": str, "estimator": str, "reference": str,
     "groups": {name: {"elements": int, "snr", "snr_mean", "snr_median", "snr_pooled", "damping", "snr_low", "snr_high",
                       "alpha", "never_moved_share", "moved_once_share": float or null, "clamped": bool}},
     "world": {...}, "versions": {...}}

The controller adds "noise_floor_correction", "weight_decay" ("scaled" or "unscaled"), "skipped_samples",
"weights_moved" (modes "online" and "moments"), and for each group "step_rms", "alpha_low", "alpha_high", "unseen_share"
(rows of tokens that did not occur) and "constant_share" (elements without noise, which no estimator counts). "mode" is
"fixed" for given alphas. "parameters": see `groups.parameter_kinds`. "failed" is the reason of a failed calibration.
"start_summed_rate": see `Schedule.summed_rate`. "factors": those of the section, already in each "alpha". Readers must
work without these keys.

`snr` is the value of the chosen estimator (for `STEPS` the effective step d in [0, 1]). An undefined value is
null, such as the SNR of a group in which nothing moved. `document.py` builds reports; `mols_ds.report` writes and
renders them.
"""

from __future__ import annotations

import math
from typing import Literal, NotRequired, TypedDict, get_args

SCHEMA = 1
Estimator = Literal["mean", "median", "pooled", "damping", "step_rms"]
STEPS: tuple[Estimator, ...] = ("damping", "step_rms")
"""Estimators whose value is an effective step d in [0, 1]. The value of the others is an SNR."""
Number = Literal[
    "snr",
    "snr_mean",
    "snr_median",
    "snr_pooled",
    "damping",
    "snr_low",
    "snr_high",
    "alpha",
    "never_moved_share",
    "moved_once_share",
]
"""Keys of a group with a number, or null if undefined."""

NUMBERS: tuple[Number, ...] = get_args(Number)
_TOP_KEYS: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "step": (int,),
    "samples": (int,),
    "mode": (str,),
    "estimator": (str,),
    "reference": (str,),
    "groups": (dict,),
    "world": (dict,),
    "versions": (dict,),
}


class ReportGroup(TypedDict):
    """One group of a report."""

    elements: int
    snr: float | None
    snr_mean: float | None
    snr_median: float | None
    snr_pooled: float | None
    damping: float | None
    step_rms: NotRequired[float | None]
    snr_low: float | None
    snr_high: float | None
    alpha: float | None
    alpha_low: NotRequired[float | None]
    alpha_high: NotRequired[float | None]
    never_moved_share: float | None
    constant_share: NotRequired[float | None]
    moved_once_share: float | None
    unseen_share: NotRequired[float | None]
    clamped: bool


class Report(TypedDict):
    """A report of schema 1."""

    schema: int
    step: int
    samples: int
    mode: str
    estimator: str
    reference: str
    groups: dict[str, ReportGroup]
    world: dict[str, int]
    versions: dict[str, str]
    noise_floor_correction: NotRequired[bool]
    skipped_samples: NotRequired[int]
    weight_decay: NotRequired[str]
    start_summed_rate: NotRequired[float]
    factors: NotRequired[dict[str, float]]
    weights_moved: NotRequired[bool]
    parameters: NotRequired[dict[str, list[str]]]
    failed: NotRequired[str]


def schema_problem(report: object) -> str | None:
    """Return the first violation of the schema as a phrase, or None."""
    if not isinstance(report, dict):
        return f"the top level is a {type(report).__name__}, not an object"
    for key, kinds in _TOP_KEYS.items():
        if key not in report:
            return f"the key {key!r} is absent"
        if not isinstance(report[key], kinds) or isinstance(report[key], bool):
            return f"{key!r} is {report[key]!r}, not of type {kinds[0].__name__}"
    if report["schema"] != SCHEMA:
        return f"'schema' is {report['schema']}"
    for key in ("step", "samples"):
        if report[key] < 0:
            return f"{key!r} is {report[key]}, not a count"
    if not report["groups"]:
        return "'groups' is empty"
    names = report.get("parameters", {})
    lists = names.values() if isinstance(names, dict) else [None]
    if not all(isinstance(groups, list) and all(isinstance(group, str) for group in groups) for groups in lists):
        return "'parameters' does not give a list of groups for each name"
    problems = (_group_problem(name, group) for name, group in report["groups"].items())
    return next((problem for problem in problems if problem), None)


def _group_problem(name: str, group: object) -> str | None:
    if not isinstance(group, dict):
        return f"groups[{name!r}] is {group!r}, not an object"
    for key in ("elements", "clamped", *NUMBERS):
        if key not in group:
            return f"groups[{name!r}] has no {key!r}"
    elements = group["elements"]
    if isinstance(elements, bool) or not isinstance(elements, int) or elements < 0:
        return f"groups[{name!r}]['elements'] is {elements!r}, not a count"
    if not isinstance(group["clamped"], bool):
        return f"groups[{name!r}]['clamped'] is {group['clamped']!r}, not a bool"
    for key in NUMBERS:
        value = group[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"groups[{name!r}][{key!r}] is {value!r}, not a number or null"
    alpha = group["alpha"]
    if alpha is not None and not 0 < alpha < math.inf:
        return f"groups[{name!r}]['alpha'] is {alpha!r}, not a finite number above 0"
    return None


def not_finite(value: object, place: str = "") -> str | None:
    """Return the path and value of the first number that is not finite, as a phrase, or None.

    A report in memory may have such numbers (an SNR without noise is infinite); the file has null instead.
    """
    if isinstance(value, dict):
        found = (not_finite(item, f"{place}[{key!r}]" if place else str(key)) for key, item in value.items())
    elif isinstance(value, list):
        found = (not_finite(item, f"{place}[{index}]") for index, item in enumerate(value))
    else:
        return f"{place} is {value!r}, not a finite number" if _is_infinite(value) else None
    return next((problem for problem in found if problem), None)


def _is_infinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
