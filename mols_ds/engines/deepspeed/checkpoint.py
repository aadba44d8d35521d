"""MoLS state in DeepSpeed checkpoints.

State that is the same on every rank (phase, counters, alphas, report) is in `client_state["mols"]`, which universal
checkpoints keep. State that differs by rank in a partial calibration (accumulators, state of a probe window) is in one
side file per rank in the tag's folder. Side files are written before DeepSpeed's files, so `latest` never names a tag
without them. Each save draws a number for both parts, so that a side file of another save is never used.
"""

from __future__ import annotations

import contextlib
import secrets
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.utils import logger

from mols_ds.core.files import write_whole
from mols_ds.core.replaced_methods import ReplacedMethods
from mols_ds.engines.deepspeed import universal_checkpoint as universal
from mols_ds.engines.deepspeed.compat import load_options, other_world_error
from mols_ds.engines.deepspeed.loads import KEY, mark_loaded
from mols_ds.engines.deepspeed.parallel.base import ParallelGrid
from mols_ds.engines.deepspeed.probe_window import EngineWindow
from mols_ds.errors import MolsCheckpointError, printable

if TYPE_CHECKING:
    from mols_ds.core.session import Session

ID_BITS = 52  # exact in float64: the ranks exchange the number by a float64 reduction


def side_file(folder: Path, rank: int, world: int) -> Path:
    """Path of one rank's accumulators. Contains the world size, so that runs of two sizes do not mix."""
    return folder / f"mols_rank_{rank:05d}_of_{world:05d}.pt"


class EngineCheckpoints:
    """Replace `save_checkpoint` and `load_checkpoint` of one engine instance until `remove()`."""

    def __init__(self, mols: Session, engine: Any, grid: ParallelGrid, window: EngineWindow) -> None:
        self.mols, self.engine, self.grid, self.window = mols, engine, grid, window
        self._methods = ReplacedMethods(engine)
        self._save = self._methods.set("save_checkpoint", self.save)
        self._load = self._methods.set("load_checkpoint", self.load)

    def remove(self) -> None:
        """Restore the engine's own methods."""
        self._methods.undo()

    def _ranks(self) -> tuple[int, int]:
        """(rank, number of ranks) for the name of this rank's side file.

        Data-parallel rank under data parallelism. It is not unique under tensor or pipeline parallelism: there it is
        the global rank.
        """
        return self.grid.rank, self.grid.size

    def _failed(self, problem: str | None) -> list[int]:
        """Return the ranks with a problem, the same on every rank. Logs this rank's problem. One small reduction."""
        rank, world = self._ranks()
        flags = torch.zeros(world, dtype=torch.float64, device="cpu")
        if problem is not None:
            flags[rank] = 1.0
            with contextlib.suppress(Exception):  # a user's log handler may raise: the other ranks reduce
                logger.warning("MoLS WARNING: rank %d: %s", rank, printable(problem))
        return [i for i, flag in enumerate(self.mols.reduce(flags).tolist()) if flag]

    # ------------------------------------------------------------------ save

    def save(
        self, save_dir: Any, tag: Any = None, client_state: Mapping[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Run `engine.save_checkpoint` with the MoLS state, also between two samples of a calibration. Loses a
        partially accumulated gradient, as DeepSpeed's checkpoints do.

        Raises:
            MolsCheckpointError: `client_state` has the key "mols". Nothing is written then.
        """
        if client_state and KEY in client_state:
            raise MolsCheckpointError(f'client_state["{KEY}"] is taken by MoLS; use another key')
        if not save_dir:
            return self._save(save_dir, tag, {}, *args, **kwargs)  # DeepSpeed's own error
        tag = str(tag) if tag is not None else f"global_step{self.engine.global_steps}"
        number = self._save_samples(Path(save_dir) / tag)
        state = {**self.mols.common_state(), "side": number}
        return self._save(save_dir, tag, {**(client_state or {}), KEY: state}, *args, **kwargs)

    def _save_samples(self, folder: Path) -> int | None:
        """Write this rank's side file if there is state for it. Returns the number of this save, else None.

        Each rank removes its file of an earlier save of this tag; rank 0 removes those of other world sizes.
        """
        controller = self.mols.controller
        rank, world = self._ranks()
        path = side_file(folder, rank, world)
        if not controller.measuring:
            _remove_stale(folder, path, rank, world)
            return None
        self.window.close_batch()  # the checkpoint loses a partially accumulated batch
        samples, random = controller.elements.state_dict(), self.window.state_dict()
        mine = torch.tensor(
            [secrets.randbits(ID_BITS) if rank == 0 else 0, samples is not None or random is not None],
            dtype=torch.float64,
            device="cpu",
        )
        drawn, holders = self.mols.reduce(mine).tolist()
        number, problem = int(drawn), None
        try:
            _remove_stale(folder, path, rank, world)
            if holders:
                window = self.grid.window
                _write({"number": number, "samples": samples, "random": random, "window": window}, path)
        except OSError as error:
            problem = f"{path} could not be written: {error}"
        if failed := self._failed(problem):
            controller.warn(
                f"rank {failed[0]} could not write its accumulators (see its log): a run that resumes from this "
                "checkpoint starts the calibration over"
            )
            return number  # no complete set of files has this number, so a resumed run detects the loss
        return number if holders else None

    # ------------------------------------------------------------------ load

    def load(self, load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Run `engine.load_checkpoint`, then load the MoLS state. The returned client_state has no "mols" key.

        - Same number of ranks: continues bit for bit, also within a calibration. The caller restores torch's RNG state,
          except for the streams of a probe window.
        - Another number (a universal checkpoint at stages 1-3): alphas and ramp continue. A partial calibration starts
          over, except in mode "moments", whose state is the optimizer's.
        - A checkpoint without MoLS state: the calibration starts as scheduled, or at once if that step is past.
        - `load_module_only`: keeps the MoLS state, but a partial calibration starts over: its samples belong to other
          weights.

        Raises:
            MolsCheckpointError: the state has other module groups, another version, or is not from MoLS; on every rank,
                after DeepSpeed has loaded its part.
            MolsUnsupportedError: a universal checkpoint with round_robin_gradients in this or the saving run.
        """
        asked = load_options(load_dir, tag, *args, **kwargs)
        with_optimizer = bool(asked["load_optimizer_states"]) and not asked["load_module_only"]
        place = universal.folder_of(self.engine, load_dir, tag)
        universal.refuse(self.engine, place, with_optimizer)
        moved = bool(self.engine.load_universal_checkpoint())
        if moved and (failed := self._failed(universal.empty_group(self.engine))):
            raise universal.empty_group_error(failed[0])
        options = universal.options_of(getattr(self.engine.optimizer, "optimizer", self.engine.optimizer))
        try:
            with universal.reading(self.engine, place):
                path, loaded = self._load(load_dir, tag, *args, **kwargs)
        except other_world_error() as error:  # another number of ranks: every rank raises
            raise MolsCheckpointError(f"{error} To resume, {universal.conversion_hint(Path(str(place)))}") from error
        mark_loaded(self.engine)
        if path is None:
            return path, loaded
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        client_state = dict(loaded or {})
        if moved and universal.was_round_robin(client_state):
            raise universal.round_robin_error("the run that saved it")
        saved = client_state.pop(KEY, None)
        if moved and (warning := universal.unrestored_warning(self.engine)):
            self.mols.controller.warn(warning)
        if asked["load_module_only"]:
            self._loaded_weights_alone()
            return path, client_state
        if moved and with_optimizer and (warning := universal.repair(self.engine, folder, options)):
            self.mols.controller.warn(warning)
        self._restore(folder, saved, with_optimizer)
        return path, client_state

    def _loaded_weights_alone(self) -> None:
        controller = self.mols.controller
        if controller.measuring and controller.samples:
            self.window.forget()
            controller.restart(
                self.mols.steps,
                "load_module_only changed the weights in the middle of a calibration: it starts over",
            )
        else:
            controller.log("MoLS: load_module_only leaves the MoLS state as it is")

    def _restore(self, folder: Path, saved: Any, with_optimizer: bool) -> None:
        mols, t = self.mols, self.engine.global_steps
        mols.window.forget()
        if saved is None:
            mols.resume_without_state(t)
        else:
            mols.resume(saved, t, lambda: self._continue(folder, saved, with_optimizer))

    def _continue(self, folder: Path, saved: Mapping[str, Any], with_optimizer: bool) -> str | None:
        """Continue a partial calibration. Returns an error, the same on every rank, or None."""
        controller = self.mols.controller
        started = controller.state.samples > 0
        if started and controller.config.mode == "moments" and not with_optimizer:
            return 'mode "moments" reads the optimizer\'s moments, which were not loaded (load_optimizer_states=False)'
        number = saved.get("side")
        if number is None:
            # No sample yet, or mode "moments", whose state is the optimizer's
            return None if not started or controller.config.mode == "moments" else "it has no accumulators"
        problem = self._load_side(folder, number)
        if failed := self._failed(problem):
            mine = problem if failed[0] == self._ranks()[0] else "its log says why"
            return f"rank {failed[0]} has no usable accumulators ({mine})" if started else None
        return None

    def _load_side(self, folder: Path, number: int) -> str | None:
        """Load this rank's accumulators and RNG state. Returns an error or None."""
        path = side_file(folder, *self._ranks())
        if not path.is_file():
            others = sorted(p.name for p in folder.glob("mols_rank_*.pt"))
            there = f"there are {', '.join(others[:2])}" if others else "there are none"
            return f"no {path.name} in {folder}; {there}: saved by another number of ranks?"
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not check the checksums
                broken = archive.testzip()
            if broken is not None:
                return f"{path.name} is corrupt: wrong checksum of {broken}"
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if content["number"] != number:
                return f"{path.name} belongs to another save of this tag"
            random = content["random"]
            if content["samples"] is not None:
                self.mols.controller.elements.load_state_dict(content["samples"])
            self._load_window(random, content.get("window"))
        except MolsCheckpointError as error:
            return f"{path.name}: {error}"
        except Exception as error:  # a truncated or foreign file raises many types (zipfile, pickle, RuntimeError)
            return f"{path.name} is corrupt: {type(error).__name__}"
        return None

    def _load_window(self, random: Any, window: Any) -> None:
        """Load this rank's probe window; from 0.4.0: the RNG states of CPU and accelerator."""
        if isinstance(random, tuple):
            self.window.load_0_4_0(random[0], {"accelerator": random[1].clone(), "tracker": {}})
        else:
            self.window.load_state_dict(random)
        self.grid.window = window


def _remove_stale(folder: Path, own: Path, rank: int, world: int) -> None:
    """Remove files of earlier saves of this tag. One rank removes each file.

    A file that cannot be removed is harmless: it has another save's number.
    """
    stale = [own, own.with_suffix(".tmp"), *folder.glob(f".{own.name}.*.tmp")]
    if rank == 0:
        every = (*folder.glob("mols_rank_*"), *folder.glob(".mols_rank_*"))
        stale += [path for path in every if f"_of_{world:05d}." not in path.name]
    for path in stale:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _write(content: dict[str, Any], path: Path) -> None:
    """Write a file atomically. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_whole(path, lambda beside: torch.save(content, beside))
    except RuntimeError as error:  # torch's writer on a full disk
        raise OSError(str(error)) from error
