"""Build the content of mols_report.json (format: docs/report.md) from group sums and alphas. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mols_ds.core.config import Mode, MolsConfig
from mols_ds.core.estimators import ESTIMATORS, Alpha, estimate, intervals
from mols_ds.core.group_stats import GroupSums
from mols_ds.core.groups import GroupTable, parameter_kinds
from mols_ds.core.schema import SCHEMA, Estimator, Report, ReportGroup

MEASURED = (
    *("snr", "snr_mean", "snr_median", "snr_pooled", "damping", "step_rms", "snr_low", "snr_high"),
    *("never_moved_share", "constant_share", "moved_once_share", "unseen_share"),
)
CONSTANT_SHARE = 0.1
"""A group is named in a warning when at least this share of its elements has no measurable noise."""


def unmeasured_rows(table: GroupTable, alphas: Mapping[str, float]) -> dict[str, ReportGroup]:
    """Build rows for alphas without a measurement (`fixed_alphas`, a failed calibration): every statistic is null."""
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
    seen_known: bool,
) -> dict[str, ReportGroup]:
    """Build one row per group: "snr" from the chosen estimator, the others uncorrected, from the same sums.

    Args:
        table: the groups of the parameters.
        sums: of all ranks.
        alphas: group -> multiplier with its interval.
        estimator, correction: of "snr" and the alphas.
        mode: in "moments" no element is known to have moved once.
        seen_known: rows of tokens that did not occur are left out; else "unseen_share" is null.

    Returns:
        group -> row. Undefined values (a group without moving elements, an interval from too few samples) are null.
    """
    chosen = estimate(sums, estimator, correction)
    plain = {name: estimate(sums, name, False) for name in ESTIMATORS}
    spread = intervals(sums, estimator, correction)
    columns = ("total", "never_moved", "constant", "moved_once", "unseen")
    total, never, constant, once, unseen = (sums.column(name) for name in columns)
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
            "step_rms": plain["step_rms"][group],
            "snr_low": spread[group][0],
            "snr_high": spread[group][1],
            "alpha": alphas[group].alpha,
            "alpha_low": alphas[group].low,
            "alpha_high": alphas[group].high,
            "never_moved_share": never[group] / seen,
            "constant_share": constant[group] / seen,
            # Adam's moments do not show in how many samples an element moved.
            "moved_once_share": once[group] / seen if mode != "moments" else math.nan,
            "unseen_share": unseen[group] / seen if seen_known else math.nan,
            "clamped": alphas[group].clamped,
        }
        rows[group] = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return rows


def remarks(config: MolsConfig, rows: Mapping[str, ReportGroup]) -> Iterator[str]:
    """Yield warnings about groups: multipliers at a bound, elements without noise or without a gradient."""
    for group, row in rows.items():
        if row["clamped"] and row["alpha"] is not None:
            bound = row["alpha"] / (config.factors or {}).get(group, 1.0)
            yield (
                f'alpha of group "{group}" hit its bound: {bound:g} '
                f"(alpha_min {config.alpha_min}, alpha_max {config.alpha_max})"
            )
        without = row["constant_share"] or 0.0
        if without >= CONSTANT_SHARE:
            yield (
                f'{without:.0%} of the elements of group "{group}" have no measurable noise and are left out: '
                "the same gradient in all samples, or gradients so small (below 1e-21, "
                'in mode "moments" below 3e-18) that fp32 loses their squares; increase the loss scale'
            )
        if row["never_moved_share"] == 1.0:
            yield f'no element of group "{group}" had a gradient in any sample; its alpha stays {row["alpha"]:g}'


def build_report(
    config: MolsConfig,
    table: GroupTable,
    groups: dict[str, ReportGroup],
    *,
    step: int,
    samples: int,
    skipped: int,
    reference: str,
    factors: Mapping[str, float] | None,
    summed_rate: float | None,
    world: Mapping[str, int],
    versions: Mapping[str, str],
) -> Report:
    """Build the report.

    Args:
        config: the "mols" section of the run.
        table: the groups of the parameters.
        groups: rows from `measured_rows` or `unmeasured_rows`.
        step: the alphas were set before this optimizer step.
        samples, skipped: number of gradient samples used and skipped.
        reference: the reference group.
        factors: constants that are in the alphas.
        summed_rate: `Schedule.summed_rate`.
        world: parallelism -> number of ranks.
        versions: package -> version.
    """
    report: Report = {
        "schema": SCHEMA,
        "step": step,
        "samples": samples,
        "mode": config.measures or "fixed",
        "estimator": config.estimator,
        "noise_floor_correction": config.noise_floor_correction,
        "reference": reference,
        "weights_moved": config.measures in ("online", "moments"),
        "weight_decay": config.weight_decay,
        "skipped_samples": skipped,
        "world": dict(world),
        "versions": dict(versions),
        "groups": groups,
        "parameters": parameter_kinds(table.layouts),
    }
    if summed_rate is not None:
        report["start_summed_rate"] = summed_rate
    if factors is not None:
        report["factors"] = dict(factors)
    return report
