"""A report as text: rows of its groups, their cells, and the table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from mols_ds.core.schema import STEPS, Report, ReportGroup
from mols_ds.errors import printable

MAX_ROWS = 16
"""With more groups than this (granularity `layer_type`), a table has one row per kind of group, with ranges."""


class Row(NamedTuple):
    """One group of a report, or one kind of group (`layers` > 1) with the smallest and largest value of its layers."""

    name: str
    layers: int
    elements: int
    share: float
    snr: tuple[float | None, float | None]
    interval: tuple[float | None, float | None]
    alpha: tuple[float | None, float | None]
    never_moved: float | None
    clamped: int
    reference: bool


def format_report(report: Report) -> str:
    """Return the report as plain text of up to about 100 columns: one headline, then the group table."""
    cells = group_cells(report)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [headline(report), ""]
    for number, row in enumerate(cells):
        # The first and last columns are text; numbers are aligned right.
        middle = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *middle, row[-1]]).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def headline(report: Report) -> str:
    """Return one line about what was measured, when and how."""
    moved = " (weights moved: counted as noise)" if report.get("weights_moved") else ""
    what = (
        f"{report['samples']} gradient samples, mode {report['mode']}{moved}, estimator {report['estimator']}, "
        f"reference {report['reference']}"
    )
    if report["mode"] == "fixed":
        what = "alphas from fixed_alphas, no measurement"
    elif report.get("failed"):
        what = f"calibration FAILED, {report['failed']}"
    if factors := report.get("factors"):
        what += f", alphas times {', '.join(f'{number:g} ({group})' for group, number in factors.items())}"
    return printable(f"MoLS at step {report['step']}: {what}")


def group_rows(report: Report) -> list[Row]:
    """Return the report's groups in order. More than `MAX_ROWS` are joined by kind (`qk.0`, `qk.1` -> `qk`)."""
    groups = report["groups"]
    join = len(groups) > MAX_ROWS
    kinds: dict[str, list[str]] = {}
    for name in groups:
        kinds.setdefault(name.split(".", 1)[0] if join else name, []).append(name)
    total = sum(group["elements"] for group in groups.values())
    return [_row(kind, names, groups, total, report["reference"]) for kind, names in kinds.items()]


def group_cells(report: Report) -> list[list[str]]:
    """Return the text cells of the group table, for the terminal and the plot. The first row is the header, the
    statistic's name in it from `statistic_name`."""
    statistic = statistic_name(report)
    cells = [["group", "elements", "share", statistic, "95 % interval", "alpha", "never moved", "note"]]
    for row in group_rows(report):
        low, high = row.interval
        interval = "-" if low is None or high is None else f"{_number(low)} .. {_number(high)}"
        never = "-" if row.never_moved is None else f"{row.never_moved:.1%}"
        cells.append(
            [
                printable(row.name),
                f"{row.elements:,}",
                f"{row.share:.1%}",
                _range(row.snr),
                interval,
                _range(row.alpha),
                never,
                _note(row),
            ]
        )
    return cells


def statistic_name(report: Report) -> str:
    """Return `d` for the estimators of effective steps, else `SNR`."""
    return "d" if report["estimator"] in STEPS else "SNR"


def _row(kind: str, names: list[str], groups: Mapping[str, ReportGroup], total: int, reference: str) -> Row:
    """Join the groups `names` into one row. Intervals of several layers are not joined: a range is not an interval."""
    members = [groups[name] for name in names]
    elements = sum(group["elements"] for group in members)
    one = members[0] if len(members) == 1 else None
    never = [(group["never_moved_share"], group["elements"]) for group in members]
    return Row(
        name=kind,
        layers=len(members),
        elements=elements,
        share=elements / total if total else 0.0,
        snr=_span([group["snr"] for group in members]),
        interval=(one["snr_low"], one["snr_high"]) if one else (None, None),
        alpha=_span([group["alpha"] for group in members]),
        never_moved=sum((s or 0.0) * n for s, n in never) / elements if elements and never[0][0] is not None else None,
        clamped=sum(bool(group["clamped"]) for group in members),
        reference=reference in names,
    )


def _note(row: Row) -> str:
    notes = [f"{row.layers} groups"] if row.layers > 1 else []
    if row.reference:
        notes.append("reference" if row.layers == 1 else "includes the reference")
    if row.clamped:
        notes.append("clamped" if row.layers == 1 else f"{row.clamped} clamped")
    return ", ".join(notes)


def _span(values: list[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else (None, None)


def _range(span: tuple[float | None, float | None]) -> str:
    low, high = span
    if low is None or high is None:
        return "-"
    return _number(low) if low == high else f"{_number(low)} .. {_number(high)}"


def _number(value: float) -> str:
    """Format three significant digits, without an exponent unless it is needed."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        digits = 3 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:.{min(digits, 5)}f}"
    return f"{value:.2e}"
