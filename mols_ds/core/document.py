"""The calibration report, the content of `mols_report.json`: its schema, its parts, its check. Renders nothing.

The report is a plain dict, so that any tool can read the file without this package:

    {"schema": 1, "step": int, "samples": int, "mode": str, "estimator": str, "reference": str,
     "groups": {name: {"elements": int, "snr", "snr_mean", "snr_median", "snr_pooled", "damping", "snr_low", "snr_high",
                       "alpha", "never_moved_share", "moved_once_share": float or null, "clamped": bool}},
     "world": {...}, "versions": {...}}

Beside these, the controller writes "noise_floor_correction", "skipped_samples", "alpha_low" and "alpha_high" for each
group, "mode": "fixed" where the alphas were given, and "failed": why, where a calibration gave none. Readers must do
without them.

`snr` is what the chosen estimator gave (for `damping` that is the mean effective step d in [0, 1]); a value that is
undefined, such as the SNR of a group in which nothing moved, is null. `mols_ds.report` writes and renders it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict, get_args

from mols_ds.core.config import Mode, MolsConfig
from mols_ds.core.estimators import ESTIMATORS, Alpha, Estimator, estimate, intervals
from mols_ds.core.group_stats import GroupSums
from mols_ds.core.groups import GroupTable

SCHEMA = 1
MEASURED = (
    *("snr", "snr_mean", "snr_median", "snr_pooled", "damping", "snr_low", "snr_high"),
    *("never_moved_share", "moved_once_share"),
)
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
"""A key of a group that is a number, or null where it is undefined."""
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


class GroupRow(TypedDict):
    """One group of a report."""

    elements: int
    snr: float | None
    snr_mean: float | None
    snr_median: float | None
    snr_pooled: float | None
    damping: float | None
    snr_low: float | None
    snr_high: float | None
    alpha: float | None
    alpha_low: NotRequired[float | None]
    alpha_high: NotRequired[float | None]
    never_moved_share: float | None
    moved_once_share: float | None
    clamped: bool


class Report(TypedDict):
    """A report of schema 1."""

    schema: int
    step: int
    samples: int
    mode: str
    estimator: str
    reference: str
    groups: dict[str, GroupRow]
    world: dict[str, int]
    versions: dict[str, str]
    noise_floor_correction: NotRequired[bool]
    skipped_samples: NotRequired[int]
    failed: NotRequired[str]


def build_report(
    config: MolsConfig,
    groups: dict[str, GroupRow],
    *,
    step: int,
    samples: int,
    skipped: int,
    reference: str,
    world: Mapping[str, int],
    versions: Mapping[str, str],
) -> Report:
    """A report of these groups.

    Args:
        config: the "mols" section of the run.
        groups: rows of `measured_rows` or `unmeasured_rows`.
        step: optimizer step before which the alphas were set.
        samples, skipped: gradient samples that were used and left out.
        reference: the reference group.
        world: parallelism -> number of ranks.
        versions: package -> version.
    """
    return {
        "schema": SCHEMA,
        "step": step,
        "samples": samples,
        "mode": "fixed" if config.fixed_alphas is not None else config.mode,
        "estimator": config.estimator,
        "noise_floor_correction": config.noise_floor_correction,
        "reference": reference,
        "skipped_samples": skipped,
        "world": dict(world),
        "versions": dict(versions),
        "groups": groups,
    }


def unmeasured_rows(table: GroupTable, alphas: Mapping[str, float]) -> dict[str, GroupRow]:
    """Rows of alphas that no measurement gave (`fixed_alphas`, a failed calibration): every statistic is null."""
    rows: dict[str, Any] = {
        row.group: {"elements": row.elements} | dict.fromkeys(MEASURED) | {"alpha": alphas[row.group], "clamped": False}
        for row in table
    }
    return rows


def measured_rows(
    table: GroupTable,
    sums: GroupSums,
    alphas: Mapping[str, Alpha],
    estimator: Estimator,
    correction: bool,
    mode: Mode,
) -> dict[str, GroupRow]:
    """One row a group: "snr" is what the chosen estimator gave, the others are uncorrected, from the same sums.

    What is undefined (a group of which no element moved, an interval with too few samples) is null.
    """
    chosen = estimate(sums, estimator, correction)
    plain = {name: estimate(sums, name, False) for name in ESTIMATORS}
    spread = intervals(sums, estimator, correction)
    total, never, once = (sums.column(name) for name in ("total", "never_moved", "moved_once"))
    rows: dict[str, Any] = {}
    for group, _, elements, _ in table:
        seen = total[group] or math.nan
        row: dict[str, Any] = {
            "elements": elements,
            "snr": chosen[group],
            "snr_mean": plain["mean"][group],
            "snr_median": plain["median"][group],
            "snr_pooled": plain["pooled"][group],
            "damping": plain["damping"][group],
            "snr_low": spread[group][0],
            "snr_high": spread[group][1],
            "alpha": alphas[group].alpha,
            "alpha_low": alphas[group].low,
            "alpha_high": alphas[group].high,
            "never_moved_share": never[group] / seen,
            # Adam's moments do not tell in how many samples an element moved.
            "moved_once_share": once[group] / seen if mode != "moments" else math.nan,
            "clamped": alphas[group].clamped,
        }
        rows[group] = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return rows


def schema_problem(report: object) -> str | None:
    """The first thing that breaks the schema, as a phrase, or None."""
    if not isinstance(report, dict):
        return f"the top level is a {type(report).__name__}, not an object"
    for key, kinds in _TOP_KEYS.items():
        if key not in report:
            return f"the key {key!r} is absent"
        if not isinstance(report[key], kinds) or isinstance(report[key], bool):
            return f"{key!r} is {report[key]!r}, not of type {kinds[0].__name__}"
    if report["schema"] != SCHEMA:
        return f"'schema' is {report['schema']}"
    if not report["groups"]:
        return "'groups' is empty"
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
    return None
