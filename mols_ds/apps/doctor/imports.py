"""Import packages in a separate process, so that a crash, a hang or an exit does no harm.

    python -m mols_ds.apps.doctor.imports TASK ...

A task is a module to import, or `module:function` to call. Before each task one JSON line is written to the file named
by `MOLS_DOCTOR_FILE`, after it another with the result. Output of the packages is discarded.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mols_ds.apps.doctor.findings import last_line

FILE = "MOLS_DOCTOR_FILE"
TIME_LIMIT = 240.0
"""Time limit in seconds for all tasks together. A busy machine needs about 30 s."""


@dataclass(frozen=True)
class Tried:
    """Result of one task: `version` (or the function's return value) if it worked, else `error`, one line."""

    version: str = ""
    error: str = ""

    @property
    def works(self) -> bool:
        return not self.error


def try_all(tasks: Sequence[str], limit: float = TIME_LIMIT) -> dict[str, Tried]:
    """Try every task in a subprocess with this process's sys.path. A task that kills the subprocess gets the error; a
    new subprocess runs the others. `limit`: seconds per subprocess."""
    found: dict[str, Tried] = {}
    while left := [task for task in tasks if task not in found]:
        done, running, ending = _run(left, limit)
        found |= done
        if running is not None:
            found[running] = Tried(error=ending)
        elif not done:
            found |= {task: Tried(error=f"could not be tried: {ending}") for task in left}
    return found


def _run(tasks: Sequence[str], limit: float) -> tuple[dict[str, Tried], str | None, str]:
    """Run one subprocess. Return (finished tasks, the task during which it ended or None, how it ended)."""
    command = [sys.executable, "-P", "-m", "mols_ds.apps.doctor.imports", *tasks]
    nowhere = subprocess.DEVNULL
    with tempfile.TemporaryDirectory(prefix="mols-doctor-") as folder:
        answers = Path(folder) / "answers"
        places = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, FILE: str(answers), "PYTHONPATH": places}
        try:
            status = subprocess.run(
                command, env=environment, stdin=nowhere, stdout=nowhere, stderr=nowhere, timeout=limit, check=False
            ).returncode
            ending = f"it ended the process with signal {-status}" if status < 0 else f"it exited with status {status}"
        except subprocess.TimeoutExpired:
            ending = f"it did not finish within {limit:.0f} s"
        text = answers.read_text("utf-8") if answers.exists() else ""
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    done = {line["task"]: Tried(line["version"], line["error"]) for line in lines if "error" in line}
    started = [line["task"] for line in lines]
    running = started[-1] if started and started[-1] not in done else None
    return done, running, ending


def attempt(task: str) -> Tried:
    """Run one task in this process. Any exception becomes the result."""
    module, _, function = task.partition(":")
    try:
        loaded = importlib.import_module(module)
        if function:
            return Tried(str(getattr(loaded, function)()))
        return Tried(str(getattr(loaded, "__version__", "") or "no version"))
    except BaseException as error:
        return Tried(error=last_line(error))


def main(tasks: Sequence[str]) -> int:
    """Run the subprocess of `try_all`."""
    with Path(os.environ[FILE]).open("w", encoding="utf-8") as file:
        for task in tasks:
            print(json.dumps({"task": task}), file=file, flush=True)
            tried = attempt(task)
            print(json.dumps({"task": task, "version": tried.version, "error": tried.error}), file=file, flush=True)
    os._exit(0)  # skip the packages' exit handlers


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
