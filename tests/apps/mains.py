"""A rank that runs a program's `main` several times, and notes what each call printed."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

from tests.apps.command import Done, job_arguments


def call(*arguments: str) -> Done:
    """train.py in this process."""
    from mols_ds.apps.train import main
    from mols_ds.training import ranks

    ranks.PATIENCE_SECONDS = 0.0
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return Done(status, out.getvalue(), err.getvalue())


def train(paths: dict[str, Path], out: Path, *more: str) -> Done:
    """train.py on the tiny job in this process."""
    return call("--deepspeed_config", str(paths["config"]), *job_arguments(paths, out, *more))


def copy_run(source: Path, target: Path, step: int | None = None) -> Path:
    """A copy of a run, as it was after the checkpoint of `step`."""
    shutil.copytree(source, target)
    if step is not None:
        for place in (target / "checkpoints").glob("step*"):
            if int(place.name.removeprefix("step")) > step:
                shutil.rmtree(place)
        (target / "checkpoints" / "latest").write_text(f"step{step}", "utf-8")
    return target


def changed_file(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a JSON file with other values of some keys."""
    target.write_text(json.dumps({**json.loads(source.read_text("utf-8")), **changes}), "utf-8")
    return target


def one_line(done: Done) -> str:
    """The line that a user's mistake prints."""
    assert done.status == 2, f"{done.status}\n{done.stdout}\n{done.stderr}"
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]
