"""The report's files: `mols_report.json` and `mols_report.png`."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mols_ds.core.files import write_whole
from mols_ds.core.schema import SCHEMA, Report, not_finite, schema_problem
from mols_ds.errors import MolsConfigError, MolsError, MolsWarning
from mols_ds.report.table import format_report

JSON_NAME = "mols_report.json"
PLOT_NAME = "mols_report.png"
_WRITERS: dict[str, Callable[[Report], None]] = {}
"""Folder of a report -> the publisher that wrote there last."""


def publisher(report_dir: str, log: Callable[[str], None]) -> Callable[[Report], None]:
    """What an engine's adapter gives the controller: log a new report as a table, then write its files.

    Args:
        report_dir: "mols.report_dir".
        log: prints one message.
    """

    def publish(report: Report) -> None:
        log(format_report(report))
        place = str(Path(report_dir).resolve())
        if _WRITERS.setdefault(place, publish) is not publish:
            _WRITERS[place] = publish
            warnings.warn(
                f"mols.report_dir={report_dir!r} has the report of another engine of this process, which is replaced; "
                "give each engine a report_dir of its own",
                MolsWarning,
                stacklevel=2,
            )
        write_report(report, report_dir)

    return publish


def write_report(report: Report, report_dir: str | os.PathLike[str]) -> Path:
    """Write `mols_report.json` and `mols_report.png` into `report_dir`, which is made if need be. Call it on one rank.

    Both files appear whole or not at all: each is written beside its place and then moved there. Numbers that are not
    finite become null, since JSON has none. Without matplotlib the plot is left out with a `MolsWarning`.

    Returns the path of the JSON file. Raises `MolsConfigError` where `report_dir` cannot be written, `MolsError` where
    `report` breaks the schema of `mols_ds.core.schema`.
    """
    clean = _finite(report)
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


def load_report(path: str | os.PathLike[str]) -> Report:
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
    except (ValueError, RecursionError) as error:  # a JSONDecodeError, a UnicodeDecodeError, or nested too deeply
        raise MolsConfigError(
            f"report {str(file)!r} is not JSON ({error}); it is damaged or another kind of file"
        ) from error
    problem = schema_problem(report) or not_finite(report)
    if problem:
        raise MolsConfigError(f"report {str(file)!r} is no MoLS report of schema {SCHEMA}: {problem}")
    checked: Report = report
    return checked


def _finite(value: Any) -> Any:
    """A copy of a JSON-like `value` in which floats that are not finite are None."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_plot(report: Report, path: Path) -> None:
    """Draw the picture. Whatever fails there but the disk is one `MolsWarning`: the report itself is written."""
    try:
        from mols_ds.report.plot import draw_report

        figure = draw_report(report)
        write_whole(path, lambda beside: figure.savefig(beside, format="png", dpi=160))
    except OSError:
        raise
    except ImportError as error:
        warnings.warn(
            f"{path.name} was not drawn ({error}); pip install matplotlib",
            MolsWarning,
            stacklevel=3,
        )
    except Exception as error:  # of matplotlib, its settings or its own imports: another backend, a damaged font, ...
        line = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(
            f"{path.name} was not drawn ({line}); see to matplotlib and MPLBACKEND", MolsWarning, stacklevel=3
        )
