"""Results of a study as lines of a JSON Lines file, small enough for git: one line per finished run.

A line has the result of the run without its long curves, and what produced it: commit, versions, processor, threads.
Files of two machines can be joined: the first line of a hash counts.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

import mols_ds
from mols_ds.core.files import append
from mols_ds.core.json_text import parse_json
from mols_ds.core.json_types import JsonMapping, JsonObject
from mols_ds.core.log import versions
from mols_ds.errors import MolsConfigError

CURVE_POINTS = 20
DIGITS = 5
"""Significant digits of the numbers in a calibration's report."""
BITS = ("val_loss", "val_curve", "losses", "alphas", "tokens")
"""What a repeated run must give again, bit for bit. "losses" is a hash of the training loss of every step."""


class Rows:
    """The lines of a file by hash. Reads the file again when it has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: tuple[int, int] | None = None
        self._rows: dict[str, JsonObject] = {}

    def read(self) -> dict[str, JsonObject]:
        """Return the rows by hash. Skips lines of a process that was killed while it wrote."""
        with contextlib.suppress(FileNotFoundError):
            found = self.path.stat()
            if (found.st_mtime_ns, found.st_size) != self._state:
                self._state = found.st_mtime_ns, found.st_size
                self._rows = {}
                for line in self.path.read_text("utf-8", "replace").splitlines():
                    with contextlib.suppress(MolsConfigError):
                        row = parse_json(line, str(self.path))
                        if isinstance(row, dict) and "key" in row:
                            self._rows.setdefault(str(row["key"]), row)
        return self._rows

    def add(self, key: str, result: JsonMapping) -> None:
        """Append the row of a finished run in one write. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.read_bytes() if self.path.is_file() else b""
        cut = bool(before) and not before.endswith(b"\n")  # by a process that was killed while it wrote
        append(self.path, "\n" * cut + json.dumps(row_of(key, result)) + "\n")


def row_of(key: str, result: JsonMapping) -> JsonObject:
    """Return the line of a result: its curve thinned to `CURVE_POINTS`, the report's groups rounded, no SNR curves."""
    row = {"key": key, **result, "made": made()}
    curve = result["curve"]
    stride = max(1, len(curve["loss"]) // CURVE_POINTS)
    row["curve"] = {name: values[stride - 1 :: stride] for name, values in curve.items()}
    report = result["report"]
    row["report"] = {name: _rounded(report[name]) for name in ("groups", "failed") if name in report}
    return row


def difference(old: JsonMapping, new: JsonMapping) -> str:
    """Return which results of two rows differ, and what made the rows if that differs too; empty for the same bits."""
    changed = [f"{name} {old[name]} is now {new[name]}" for name in BITS if old[name] != new[name]]
    then, now = ({name: value for name, value in row["made"].items() if name != "ended"} for row in (old, new))
    return "; ".join(changed) + (f" (made by {then}, now {now})" if changed and then != now else "")


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


@functools.cache
def _constant() -> JsonObject:
    package = Path(mols_ds.__file__).parent
    commit = _git(package, "rev-parse", "HEAD")
    if commit and _git(package, "status", "--porcelain", "--", str(package)) != "":
        commit += "-dirty"
    return {"commit": commit, "processor": _processor(), "versions": versions(("deepspeed", "transformers"))}


def made() -> JsonObject:
    """Describe what makes a row now: commit of this package ("-dirty": with changes), processor, versions, threads."""
    ended = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {**_constant(), "threads": torch.get_num_threads(), "ended": ended}


def _git(folder: Path, *arguments: str) -> str | None:
    """Return git's output; None without git or outside a checkout."""
    try:
        ran = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return platform.machine()
