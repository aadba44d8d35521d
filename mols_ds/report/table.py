"""The calibration report: `mols_report.json`, its text table and `mols_report.png`.

The report is a plain dict, so that any tool can read the file without this package:

    {"schema": 1, "step": int, "samples": int, "mode": str, "estimator": str, "reference": str,
     "groups": {name: {"elements": int, "snr", "snr_mean", "snr_median", "snr_pooled", "damping", "snr_low", "snr_high",
                       "alpha", "never_moved_share", "moved_once_share": float or null, "clamped": bool}},
     "world": {...}, "versions": {...}}

Beside these, the controller writes "noise_floor_correction", "skipped_samples", "alpha_low", "alpha_high" and
"constant_share" (elements without noise, which no estimator counts) for each group, "mode": "fixed" where the alphas
were given, and "failed": why, where a calibration gave none. Readers must do without them.

`snr` is what the chosen estimator gave (for `damping` that is the mean effective step d in [0, 1]); a value that is
undefined, such as the SNR of a group in which nothing moved, is null. The plot is drawn by `mols_ds.report.plot`.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mols_ds.core.files import write_whole
from mols_ds.errors import MolsConfigError, MolsError, MolsWarning

SCHEMA = 1
JSON_NAME = "mols_report.json"
PLOT_NAME = "mols_report.png"
MAX_ROWS = 16
"""Above this many groups (granularity `layer_type`) a table has one row for each kind of group, with ranges."""

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
_GROUP_NUMBERS = (
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
)


class Row(NamedTuple):
    """One group of a report, or one kind of group (`layers` > 1) with the least and greatest value of its layers."""

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


class Table(NamedTuple):
    """Text cells of a report's groups, used by the terminal and the plot alike; `cells[0]` is the head."""

    cells: list[list[str]]
    rows: list[Row]


def write_report(report: Mapping[str, Any], report_dir: str | os.PathLike[str]) -> Path:
    """Write `mols_report.json` and `mols_report.png` into `report_dir`, which is made if need be. Call it on one rank.

    Both files appear whole or not at all: each is written beside its place and then moved there. Numbers that are not
    finite become null, since JSON has none. Without matplotlib the plot is left out with a `MolsWarning`.

    Returns the path of the JSON file. Raises `MolsConfigError` where `report_dir` cannot be written, `MolsError` where
    `report` breaks the schema above.
    """
    clean = _finite(dict(report))
    problem = schema_problem(clean)
    if problem:
        raise MolsError(f"the report was not written, it breaks its schema: {problem}")
    folder = Path(report_dir)
    text = json.dumps(clean, indent=2, allow_nan=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / JSON_NAME, text)
        _write_plot(clean, folder / PLOT_NAME)
    except OSError as error:
        raise MolsConfigError(
            f"mols.report_dir={str(report_dir)!r} cannot be written ({error.strerror or error}); "
            "name a folder that this user may write to"
        ) from error
    return folder / JSON_NAME


def load_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check a `mols_report.json`; `path` is the file or the folder that holds it.

    Raises `MolsConfigError` with one line for a file that is missing, is not JSON, or is no report of this schema.
    """
    file = Path(path)
    if file.is_dir():
        file = file / JSON_NAME
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise MolsConfigError(
            f"report {str(file)!r} cannot be read ({error.strerror or error}); name a {JSON_NAME} or its folder"
        ) from error
    except ValueError as error:  # a JSONDecodeError or a UnicodeDecodeError
        raise MolsConfigError(
            f"report {str(file)!r} is not JSON ({error}); it is damaged or another kind of file"
        ) from error
    problem = schema_problem(report)
    if problem:
        raise MolsConfigError(f"report {str(file)!r} is no MoLS report of schema {SCHEMA}: {problem}")
    checked: dict[str, Any] = report
    return checked


def format_report(report: Mapping[str, Any]) -> str:
    """The report as plain text of at most about 100 columns: one line of facts, then the group table."""
    cells = group_cells(report).cells
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [headline(report), ""]
    for number, row in enumerate(cells):
        # The first and the last column are words, all others numbers, which line up at the right.
        middle = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *middle, row[-1]]).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def headline(report: Mapping[str, Any]) -> str:
    """What was measured when and how, in one line."""
    if report["mode"] == "fixed":
        return f"MoLS at step {report['step']}: alphas as given by fixed_alphas, nothing measured"
    if report.get("failed"):
        return f"MoLS at step {report['step']}: calibration FAILED, {report['failed']}"
    return (
        f"MoLS at step {report['step']}: {report['samples']} gradient samples, mode {report['mode']}, "
        f"estimator {report['estimator']}, reference {report['reference']}"
    )


def group_rows(report: Mapping[str, Any]) -> list[Row]:
    """The report's groups in their order; more than `MAX_ROWS` of them are joined by kind (`qk.0`, `qk.1` -> `qk`)."""
    groups: Mapping[str, Mapping[str, Any]] = report["groups"]
    join = len(groups) > MAX_ROWS
    kinds: dict[str, list[str]] = {}
    for name in groups:
        kinds.setdefault(name.split(".", 1)[0] if join else name, []).append(name)
    total = sum(group["elements"] for group in groups.values())
    return [_row(kind, names, groups, total, report["reference"]) for kind, names in kinds.items()]


def group_cells(report: Mapping[str, Any]) -> Table:
    """The cells of the group table. For the estimator `damping` the statistic is headed `d`, else `SNR`."""
    statistic = statistic_name(report)
    cells = [["group", "elements", "share", statistic, "95 % interval", "alpha", "never moved", "note"]]
    rows = group_rows(report)
    for row in rows:
        low, high = row.interval
        interval = "-" if low is None or high is None else f"{_number(low)} .. {_number(high)}"
        never = "-" if row.never_moved is None else f"{row.never_moved:.1%}"
        cells.append(
            [
                row.name,
                f"{row.elements:,}",
                f"{row.share:.1%}",
                _range(row.snr),
                interval,
                _range(row.alpha),
                never,
                _note(row),
            ]
        )
    return Table(cells, rows)


def statistic_name(report: Mapping[str, Any]) -> str:
    """`d` for the estimator `damping`, which averages effective steps, `SNR` for the others."""
    return "d" if report["estimator"] == "damping" else "SNR"


def _row(kind: str, names: list[str], groups: Mapping[str, Mapping[str, Any]], total: int, reference: str) -> Row:
    """Join the groups `names` to one row. Intervals of several layers are not joined: their range is no interval."""
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
        notes.append("reference" if row.layers == 1 else "holds the reference")
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
    """Three significant digits, without an exponent where a reader does not need one."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        digits = 3 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:.{min(digits, 5)}f}"
    return f"{value:.2e}"


def _finite(value: Any) -> Any:
    """A copy of a JSON-like `value` in which floats that are not finite are None."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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
    for key in ("elements", "clamped", *_GROUP_NUMBERS):
        if key not in group:
            return f"groups[{name!r}] has no {key!r}"
    elements = group["elements"]
    if isinstance(elements, bool) or not isinstance(elements, int) or elements < 0:
        return f"groups[{name!r}]['elements'] is {elements!r}, not a count"
    if not isinstance(group["clamped"], bool):
        return f"groups[{name!r}]['clamped'] is {group['clamped']!r}, not a bool"
    for key in _GROUP_NUMBERS:
        value = group[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"groups[{name!r}][{key!r}] is {value!r}, not a number or null"
    return None


def _write_plot(report: Mapping[str, Any], path: Path) -> None:
    try:
        from mols_ds.report.plot import draw_report
    except ImportError as error:
        warnings.warn(
            f"{path.name} was not drawn ({error}); install it by: pip install 'mols-ds[report]'",
            MolsWarning,
            stacklevel=3,
        )
        return
    figure = draw_report(report)
    write_whole(path, lambda beside: figure.savefig(beside, format="png", dpi=160))
