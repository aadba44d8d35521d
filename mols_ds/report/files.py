"""Write and read the report's files: `mols_report.json` and `mols_report.png`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mols_ds.core.files import write_whole
from mols_ds.core.json_text import read_json
from mols_ds.core.log import warn_here
from mols_ds.core.schema import SCHEMA, Report, not_finite, schema_problem
from mols_ds.errors import MolsConfigError, MolsError
from mols_ds.report.table import format_report

FOLDER = "mols_report"
JSON_NAME = "mols_report.json"
PLOT_NAME = "mols_report.png"
_TAKEN: set[Path] = set()
"""Folders with the report of an engine in this process."""


class Publisher:
    """Log a new report as a table, then write its files. The adapter of an engine passes it to the controller.

    If two engines of a process (a GAN's, or policy and critic) use the same folder, the second one writes to a folder
    beside it, with a warning.

    Args:
        report_dir: "mols.report_dir".
        log: function that prints one message.
    """

    def __init__(self, report_dir: str, log: Callable[[str], None]) -> None:
        self.report_dir, self.log = report_dir, log
        self._folder: Path | None = None

    def __call__(self, report: Report) -> None:
        with contextlib.suppress(Exception):  # the user's log failed: write the files anyway
            self.log(format_report(report))
        if self._folder is None:
            self._folder = self._take()
        write_report(report, self._folder)

    def _take(self) -> Path:
        place = wanted = Path(self.report_dir).resolve()
        number = 1
        while place in _TAKEN:
            number += 1
            place = wanted.with_name(f"{wanted.name}-{number}")
        _TAKEN.add(place)
        if place != wanted:
            warn_here(
                f"mols.report_dir={self.report_dir!r} has the report of another engine of this process; writing to "
                f"{place} instead: give each engine its own report_dir"
            )
        return place

    def release(self) -> None:
        """Release the folder for another engine of this process. Called when this engine is detached."""
        _TAKEN.discard(self._folder or Path())
        self._folder = None


_DRAWS = [True]


def draw_no_plots() -> None:
    """Write reports of this process without their picture: a study trains hundreds of runs."""
    _DRAWS[0] = False


def write_report(report: Report, report_dir: str | os.PathLike[str]) -> Path:
    """Write `mols_report.json` and `mols_report.png` atomically. Call on one rank.

    Args:
        report: as `Handle.report`. Numbers that are not finite become null in the file.
        report_dir: folder, created if needed.

    Returns:
        The path of the JSON file.

    Raises:
        MolsConfigError: `report_dir` cannot be written. Without matplotlib there is no picture, but a `MolsWarning`.
        MolsError: `report` violates the schema of `mols_ds.core.schema`.
    """
    clean = finite(report)
    problem = schema_problem(clean)
    if problem:
        raise MolsError(f"the report was not written, because it violates its schema: {problem}")
    folder = Path(report_dir)
    text = json.dumps(clean, indent=2, allow_nan=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / JSON_NAME, text)
        if _DRAWS[0]:
            _write_figure(folder / PLOT_NAME, "mols_ds.report.plot.draw_report", clean)
    except OSError as error:
        raise MolsConfigError(
            f"mols.report_dir={str(report_dir)!r} cannot be written ({error.strerror or error}); "
            "name a folder that this user may write to"
        ) from error
    return folder / JSON_NAME


def load_report(path: str | os.PathLike[str]) -> Report:
    """Read and check a report.

    Args:
        path: a `mols_report.json`, its folder, or a run's `--out`.

    Raises:
        MolsConfigError: one line, if the file is missing, not JSON, or not a report of this schema.
    """
    file = Path(path)
    if file.is_dir():
        places = [place / FOLDER / JSON_NAME for place in run_places(file)]
        file = next((place for place in places if place.is_file()), file / JSON_NAME)
    if not file.exists():
        raise MolsConfigError(f"report {file} cannot be read (no such file); name a {JSON_NAME} or its folder")
    report = read_json(file, f"report {file}")
    problem = schema_problem(report) or not_finite(report)
    if problem:
        raise MolsConfigError(f"report {file} is not a MoLS report of schema {SCHEMA}: {problem}")
    return cast(Report, report)


def run_places(out: str | os.PathLike[str]) -> list[Path]:
    """Return the folders in which a run in `out` may have its report and metrics: itself, the second arm of a
    comparison."""
    return [Path(out), Path(out) / "mols"]


def write_run_plot(lines: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw SNR and rates of a run (lines of its metrics) to `path`. Returns whether it was drawn; warns if not.

    Raises:
        MolsConfigError: the file cannot be written.
    """
    try:
        return _write_figure(path, "mols_ds.report.plot.draw_run", lines, str(path.parent))
    except OSError as error:
        raise MolsConfigError(f"report: {path}: {error.strerror or error}") from error


def finite(value: Any) -> Any:
    """Copy a JSON-like `value`, with None for non-finite floats, and named tuples as objects."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_figure(path: Path, draw: str, *arguments: object) -> bool:
    """Write the figure of the function `draw`, whose module needs matplotlib. Any failure except of the disk is a
    `MolsWarning`: the report itself is written."""
    try:
        figure = pkgutil.resolve_name(draw)(*arguments)
        write_whole(path, lambda beside: figure.savefig(beside, format="png", dpi=160))
        return True
    except OSError:
        raise
    except ImportError as error:
        warn_here(f"{path.name} was not drawn ({error}); pip install matplotlib", stacklevel=3)
    except Exception as error:  # any error of matplotlib: its settings, imports, backend, fonts
        line = f"{type(error).__name__}: {error}"
        warn_here(f"{path.name} was not drawn ({line}); check matplotlib and MPLBACKEND", stacklevel=3)
    return False
