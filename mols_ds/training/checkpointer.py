"""Atomic checkpoints: write under another name, list checksums, rename, and only then name it newest.

All ranks write `FOLDER/stepN.partial`. Its `manifest.json` then gets the size and CRC-32 of every file. The folder is
renamed to `stepN`, and `FOLDER/latest` names it last. So a run that is killed at any point keeps its previous
checkpoint. A resumed run checks every file of the newest checkpoint against the manifest, because torch.load checks no
checksums. If a file is missing, truncated or changed, it uses the previous checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from mols_ds.core.files import empty_folder, synchronize, write_whole
from mols_ds.core.json_text import read_json
from mols_ds.core.log import warn_here
from mols_ds.errors import MolsCheckpointError, MolsTrainingError

LATEST, MANIFEST = "latest", "manifest.json"
PARTIAL, FORMER = ".partial", ".former"
_STEP = re.compile(r"step(\d+)")
_CHUNK = 1 << 24
ALMOST_FULL = 1 << 20
"""Free bytes of a disk that a failed write has filled."""
_T = TypeVar("_T")


def has_checkpoint(folder: Path) -> bool:
    """Whether `folder` has a checkpoint: a `latest`, or a complete step that `latest` does not name yet."""
    return (folder / LATEST).is_file() or any(folder.glob(f"step*/{MANIFEST}"))


def step_of(tag: str) -> int:
    """N of `stepN`; -1 for other names."""
    found = _STEP.fullmatch(tag)
    return int(found[1]) if found else -1


def check_finite(parameters: Iterable[Tensor], step: int, agree: Callable[[bool], bool]) -> None:
    """Check that all ranks' weights are finite. Collective.

    Args:
        parameters: this rank's; their shards under ZeRO-3.
        step: the last update, for the message.
        agree: returns whether its argument is True on all ranks.

    Raises:
        MolsTrainingError: on every rank, for NaN or infinity on any rank.
    """
    shards = (getattr(parameter, "ds_tensor", parameter) for parameter in parameters)
    fine = all(bool(torch.isfinite(shard.detach()).all()) for shard in shards if shard.is_floating_point())
    if not agree(fine):
        raise MolsTrainingError(
            f"the weights are not finite after step {step}: nothing is saved. Continue with --resume from the newest "
            "checkpoint; if it happens again, use a smaller rate or check the data of the steps before"
        )


@dataclass(frozen=True)
class Retention:
    """Which checkpoints of a run stay: the newest `last`, and those of every `every`-th step. None, None: all."""

    last: int | None = None
    every: int | None = None

    def superseded(self, steps: Iterable[int]) -> list[int]:
        """Return the steps whose checkpoints may go. The newest stays in any case."""
        if self.last is None and self.every is None:
            return []
        older = sorted(steps)[: -(self.last or 1)]
        return [step for step in older if self.every is None or step % self.every]


class Checkpointer:
    """Save and load the checkpoints `stepN` of one folder. Call every method on all ranks at the same point.

    Args:
        folder: one for all ranks; with `node_local`, one on each node.
        node_local: DeepSpeed's `checkpoint.use_node_local_storage`: each node has the files of its own ranks.
        keep: which checkpoints stay after a save.
    """

    def __init__(self, folder: Path, *, node_local: bool = False, keep: Retention | None = None) -> None:
        self.folder, self.keep = folder, keep or Retention()
        ranks = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if ranks else (0, 1)
        self._node, self._nodes = self.rank, self.world
        if node_local and ranks:
            self._node = int(os.environ.get("LOCAL_RANK", "0"))
            self._nodes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or self.world)
        self._home = self.rank - self._node
        self.leader = self._node == 0
        """Whether this rank renames folders and writes the files that all ranks share."""

    # -- save

    def save(self, tag: str, write: Callable[[Path], None]) -> None:
        """Save checkpoint `tag`.

        Args:
            tag: `stepN`.
            write: writes the content into the folder that it gets.

        Raises:
            MolsCheckpointError: on a rank that cannot write. Its process must end: the others may wait for it in a
                collective of `write` until their launcher ends them.
        """
        partial = self.folder / f"{tag}{PARTIAL}"
        try:
            if self.leader:
                empty_folder(partial)
            self._barrier()
            write(partial)
            self._barrier()
            listed = self._list(partial)
            if self.leader:
                self._commit(tag, partial, listed)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            if isinstance(error, dist.DistError) or "Connection" in str(error):
                raise
            line = next(iter(str(error).splitlines()), type(error).__name__)
            if shutil.disk_usage(self.folder).free < ALMOST_FULL:  # torch's writer does not report it
                line = "no space left on this disk"
            raise MolsCheckpointError(
                f"checkpoint {tag} cannot be saved in {self.folder}: {line}; the earlier checkpoints are unchanged"
            ) from error
        self._barrier()

    def _commit(self, tag: str, partial: Path, listed: dict[str, dict[str, int]]) -> None:
        write_whole(partial / MANIFEST, json.dumps({"schema": 1, "files": listed}, indent=1) + "\n")
        place, former = self.folder / tag, self.folder / f"{tag}{FORMER}"
        shutil.rmtree(former, ignore_errors=True)
        if place.exists():
            place.rename(former)
        partial.rename(place)
        write_whole(self.folder / LATEST, tag)
        synchronize(self.folder)
        shutil.rmtree(former, ignore_errors=True)
        saved = (step_of(path.parent.name) for path in self.folder.glob(f"step*/{MANIFEST}"))
        for step in self.keep.superseded([step for step in saved if 0 <= step <= step_of(tag)]):
            shutil.rmtree(self.folder / f"step{step}", ignore_errors=True)

    def _list(self, place: Path) -> dict[str, dict[str, int]]:
        """Size and CRC-32 of every file below `place` but the manifest. Each rank reads its share."""
        files = sorted(path for path in place.rglob("*") if path.is_file() and path.name != MANIFEST)
        mine = {
            str(path.relative_to(place)): {"bytes": path.stat().st_size, "crc32": _checksum(path)}
            for path in files[self._node :: self._nodes]
        }
        shares = (share for home, share in self._gather((self._home, mine)) if home == self._home)
        return {name: entry for share in shares for name, entry in share.items()}

    # -- load

    def newest(self) -> str:
        """Return the newest complete checkpoint: the one in `latest`, or an older one with a warning.

        Repairs an interrupted save.

        Raises:
            MolsCheckpointError: no checkpoint is complete.
        """
        if self.leader:
            self._repair()
        tags = self._gather(self._candidates())[0]
        problems: list[str] = []
        for tag in tags:
            problem = self.problem(tag)
            if problem is None:
                if problems and self.rank == 0:
                    warn_here(f"{'; '.join(problems)}: using {tag}", stacklevel=2)
                return tag
            problems.append(f"checkpoint {tag} is broken ({problem})")
        what = "; ".join(problems) or f"there is no checkpoint in {self.folder}"
        raise MolsCheckpointError(f"--resume: {what}")

    def problem(self, tag: str) -> str | None:
        """Return an error in checkpoint `tag`, the same on every rank, or None.

        Accepts a checkpoint without a manifest (from an earlier release) unchecked.
        """
        place = self.folder / tag
        mine = self._problem(place) if place.is_dir() else f"there is no {place.name}"
        return next((problem for problem in self._gather(mine) if problem is not None), None)

    def _problem(self, place: Path) -> str | None:
        try:
            listed = read_json(place / MANIFEST, MANIFEST) if os.path.lexists(place / MANIFEST) else None
            if listed is None:
                return None
            files = sorted(listed["files"].items())  # type: ignore[index]
            for name, entry in files[self._node :: self._nodes]:
                size = (place / name).stat().st_size
                if size != entry["bytes"]:
                    return f"{name} has {size} bytes instead of {entry['bytes']}"
                if _checksum(place / name) != entry["crc32"]:
                    return f"{name} is corrupt: wrong checksum"
        except FileNotFoundError as error:
            return f"{Path(error.filename).relative_to(place)} is missing"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{MANIFEST} cannot be read: {type(error).__name__}"
        return None

    def _candidates(self) -> list[str]:
        """The checkpoint in `latest`, then every older one. Without `latest`: all, newest first."""
        found = sorted((path.parent.name for path in self.folder.glob(f"step*/{MANIFEST}")), key=step_of, reverse=True)
        found = [tag for tag in found if step_of(tag) >= 0]
        try:
            named = (self.folder / LATEST).read_text("utf-8").strip()
        except (OSError, ValueError):
            return found
        if step_of(named) < 0:
            return [named, *found]
        return [named, *(tag for tag in found if step_of(tag) < step_of(named))]

    def _repair(self) -> None:
        """Clean up after a killed save: remove the unfinished part, and restore the previous checkpoint of the same
        step if the save ended between its two renames."""
        for unfinished in self.folder.glob(f"step*{PARTIAL}"):
            shutil.rmtree(unfinished, ignore_errors=True)
        for unfinished in self.folder.glob(f".{LATEST}.*.tmp"):
            unfinished.unlink(missing_ok=True)
        for former in self.folder.glob(f"step*{FORMER}"):
            place = former.with_suffix("")
            if place.exists():
                shutil.rmtree(former, ignore_errors=True)
            else:
                former.rename(place)

    # -- ranks

    def _barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def _gather(self, mine: _T) -> list[_T]:
        """Return every rank's object, in rank order."""
        every = [mine] * self.world
        if self.world == 1:
            return every
        dist.all_gather_object(every, mine)
        return every


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file. Flushes the file to disk."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    synchronize(path)
    return value
