"""The output folder of a run: one run at a time, not overwritten by accident, with its settings in run.json."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import distributed as dist

from mols_ds.core.files import write_whole
from mols_ds.core.json_text import read_json
from mols_ds.core.log import tell, warn_here
from mols_ds.errors import MolsCheckpointError, MolsConfigError, MolsError
from mols_ds.training.resume_settings import Settings, compare
from mols_ds.training.trainer import ADAM, CHECKPOINTS, METRICS, MOLS, has_checkpoint

RUN, LOCK = "run.json", "run.lock"
REPORT, BOARD = "mols_report", "tensorboard"
BASE = "model_files"
"""Folder in OUT with the configuration of the trained model and its tokenizer, without weights."""
_REPLACED = (METRICS, CHECKPOINTS, RUN, REPORT, BOARD, BASE, "compare.json", "compare.png")


class MistakeEverywhere(MolsConfigError):
    """A mistake that is found on every rank, so that rank 0 alone prints it."""


def add_output_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --out, --resume and --overwrite. default: of --out, in words."""
    parser.add_argument("--out", type=Path, help=f"output folder (default: {default})")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in --out and start a new one")


def holds_run(out: Path) -> bool:
    """Whether a run has written checkpoints or metrics to `out`, also one of the two arms of a comparison."""
    places = (out, out / ADAM, out / MOLS)
    return any(has_checkpoint(place) or _size(place / METRICS) > 0 for place in places)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def check_out(out: Path, *, resume: bool, overwrite: bool, compared: bool) -> None:
    """Check --out against --resume and --overwrite before the ranks join, and create the folder.

    Raises:
        MolsConfigError: nothing to resume, a run that would be lost, or a folder that cannot be created.
    """
    if resume and overwrite:
        raise MolsConfigError("--resume continues the run in --out, --overwrite deletes it: give one of them")
    if resume and not has_checkpoint(out / ADAM if compared else out):
        more = "; --overwrite starts a new run" if holds_run(out) else "; leave it out to start a new run"
        raise MolsConfigError(f"--resume: there is no checkpoint below {out}{more}")
    if not resume and not overwrite and holds_run(out):
        raise MolsConfigError(
            f"--out {out} contains a run: --resume continues it, --overwrite deletes it; or give another --out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MolsConfigError(f"--out {out}: {error.strerror or error}") from error


@contextlib.contextmanager
def claim(out: Path, *, overwrite: bool, rank: int) -> Iterator[None]:
    """Keep other runs from using `out` in a `with` block, and delete the run in it if `overwrite`. Collective.

    Raises:
        MolsConfigError: on every rank, if another run uses the folder or it cannot be written.
    """
    lock: list[int] = []

    def take() -> None:
        lock.extend(_lock(out))
        if overwrite and holds_run(out):
            _delete_run(out)

    on_first_rank(rank, take)
    try:
        if overwrite:
            if rank and os.environ.get("LOCAL_RANK", "0") == "0":  # a node's own checkpoints
                shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
            if dist.is_initialized():
                dist.barrier()
        yield
    finally:
        for descriptor in lock:
            os.close(descriptor)


def _lock(out: Path) -> list[int]:
    """Lock `out`. Returns the open file: the kernel drops the lock when it is closed, also by a process's death."""
    path = out / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise MolsConfigError(f"--out {out}: {LOCK}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 200).decode("utf-8", "replace")
        os.close(descriptor)
        raise MolsConfigError(
            f"--out {out}: another run uses it ({holder}): wait until it has ended, or give another --out"
        ) from error
    except OSError as error:  # some network file systems, as they are mounted, have no locks
        os.close(descriptor)
        warn_here(f"--out {out}: no lock ({error.strerror}); make sure that no other run uses this folder")
        return []
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, {time.ctime()}".encode())
    return [descriptor]


def _delete_run(out: Path) -> None:
    """Delete what a run has written, by name: the folder may contain other files of the user."""
    for place in (out, out / ADAM, out / MOLS):
        for name in _REPLACED:
            path = place / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def settle(out: Path, settings: Settings, *, resume: bool, rank: int) -> bool:
    """Compare the settings with those in OUT/run.json, if the run resumes. Collective.

    Args:
        settings: every resolved setting, flat (`resume_settings`).

    Returns:
        Whether some differ, on every rank. False for a run of a release that saved none.

    Raises:
        MolsConfigError: on every rank, if the run cannot continue with these settings.
    """
    changes: list[str] = []

    def work() -> None:
        path = out / RUN
        if resume and path.is_file():
            saved = read_json(path, f"--resume: {path}")
            if not isinstance(saved, dict) or not isinstance(saved.get("settings"), dict):
                raise MolsCheckpointError(f"--resume: {path} is not a file of this program; delete it to continue")
            changes.extend(compare(saved["settings"], json.loads(json.dumps(settings))))
            for line in changes:
                tell(f"--resume: {line}")

    on_first_rank(rank, work)
    return agreed(bool(changes))


def save_settings(out: Path, settings: Settings, rank: int) -> None:
    """Save the settings in OUT/run.json. Call it when the checkpoint is loaded: a refused one must not change the file.
    Collective. Raises MolsConfigError on every rank, if they cannot be written."""
    text = json.dumps({"schema": 1, "settings": dict(settings)}, indent=1) + "\n"
    on_first_rank(rank, lambda: write_whole(out / RUN, text))


def agreed(value: bool) -> bool:
    """Return rank 0's value on every rank."""
    values = [value]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def on_first_rank(rank: int, work: Callable[[], None]) -> None:
    """Run `work` on rank 0. Collective.

    Raises:
        MistakeEverywhere: on every rank, for a MolsError or OSError of `work`.
    """
    problems: list[str | None] = [None]
    if rank == 0:
        try:
            work()
        except MolsError as error:
            problems = [str(error)]
        except OSError as error:
            problems = [f"{error.filename}: {error.strerror or error}"]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(problems)
    if problems[0] is not None:
        raise MistakeEverywhere(problems[0])
