"""MoLS state in DeepSpeed checkpoints.

What is the same on every rank (phase, counters, alphas, report) rides in `client_state["mols"]`, which survives the
universal checkpoint. Accumulators of a half-done calibration, which differ by rank, go into one side file a rank in the
tag's folder, written before DeepSpeed's own files so that `latest` never names a tag without them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm as dist

from mols_ds.errors import MolsCheckpointError, MolsUnsupportedError

if TYPE_CHECKING:
    from mols_ds.zero.engine import EngineMols

KEY = "mols"


def side_file(folder: Path, rank: int, world: int) -> Path:
    """The file of one rank's accumulators; the world size is in the name so that runs of two sizes cannot mix."""
    return folder / f"mols_rank_{rank:05d}_of_{world:05d}.pt"


class Checkpoints:
    """Patches `save_checkpoint` and `load_checkpoint` of one engine instance until `remove()`."""

    def __init__(self, mols: EngineMols) -> None:
        self.mols = mols
        self.engine = mols.engine
        self._save = self.engine.save_checkpoint
        self._load = self.engine.load_checkpoint
        self.engine.save_checkpoint = self.save
        self.engine.load_checkpoint = self.load

    def remove(self) -> None:
        """Give the engine its own methods back."""
        del self.engine.save_checkpoint
        del self.engine.load_checkpoint

    # ------------------------------------------------------------------ save

    def save(
        self, save_dir: Any, tag: Any = None, client_state: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """`engine.save_checkpoint` with the MoLS state. The key "mols" of `client_state` is ours."""
        if client_state and KEY in client_state:
            raise MolsCheckpointError(f'client_state["{KEY}"] is taken by MoLS; use another key')
        tag = str(tag) if tag is not None else f"global_step{self.engine.global_steps}"
        self._save_samples(Path(save_dir) / tag)
        state = {**(client_state or {}), KEY: self.mols.controller.state_dict()}
        return self._save(save_dir, tag=tag, client_state=state, **kwargs)

    def _ranks(self) -> tuple[int, int]:
        group = self.engine.seq_data_parallel_group
        return dist.get_rank(group), dist.get_world_size(group)

    def _save_samples(self, folder: Path) -> None:
        samples = self.mols.controller.sample_state()
        if samples is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = side_file(folder, *self._ranks())
        partial = path.with_suffix(".tmp")
        torch.save({"samples": samples, "random": self.mols._random}, partial)
        os.replace(partial, path)

    # ------------------------------------------------------------------ load

    def load(self, load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """`engine.load_checkpoint`, then the MoLS state; the returned client_state is the user's own again.

        A checkpoint without MoLS state (from before it was switched on) loads too: the calibration starts where the
        schedule says, or at once where that step is past. With `load_module_only` the MoLS state is left as it is.
        """
        options = self._options()
        universal = bool(self.engine.load_universal_checkpoint())
        if universal and getattr(self.engine.optimizer, "round_robin_gradients", False):
            raise MolsUnsupportedError(
                "a universal checkpoint with round_robin_gradients: DeepSpeed loads most weights into wrong places; "
                'set "round_robin_gradients": false for the run that loads it'
            )
        path, client_state = self._load(load_dir, tag, *args, **kwargs)
        if path is None:
            return path, client_state
        if universal:
            self._reapply(options)
        client_state = dict(client_state or {})
        saved = client_state.pop(KEY, None)
        if kwargs.get("load_module_only") or (len(args) > 3 and args[3]):
            self.mols.controller.log("MoLS: load_module_only leaves the MoLS state as it is")
        else:
            folder = Path(path) if Path(path).is_dir() else Path(path).parent
            self._restore(folder, saved)
        return path, client_state

    def _restore(self, folder: Path, saved: Mapping[str, Any] | None) -> None:
        controller, t = self.mols.controller, self.engine.global_steps
        self.mols._random = None
        if saved is None:
            controller.restart(
                t,
                f"the checkpoint at step {t} has no MoLS state (saved before MoLS was on): all multipliers are 1, "
                f"the calibration starts at step {max(t, controller.state.schedule.start)}",
            )
            return
        controller.load_state_dict(saved)
        if controller.state.phase == "calibrating" and controller.state.samples and controller.config.mode != "moments":
            problem = self._load_samples(folder)
            if not self.mols.agree(problem is None):
                controller.restart(
                    t,
                    "the half-done calibration of this checkpoint cannot be continued "
                    f"({problem or 'another rank could not read its part'}); it starts over at step {t}",
                )
        controller.advance(t)
        controller.log(
            f"MoLS resumed at step {t}: phase {controller.phase}, {controller.samples} samples, "
            f"alphas {controller.alphas or 'not set yet'}"
        )

    def _load_samples(self, folder: Path) -> str | None:
        """This rank's accumulators; returns what is wrong with them, or None."""
        path = side_file(folder, *self._ranks())
        if not path.is_file():
            others = sorted(p.name for p in folder.glob("mols_rank_*.pt"))
            return f"no {path.name}; there are {', '.join(others[:2]) or 'none'}: another number of ranks?"
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            self.mols.controller.load_sample_state(content["samples"])
        except MolsCheckpointError as error:
            return str(error)
        except Exception as error:  # a truncated or corrupt file raises many types (zipfile, pickle, RuntimeError)
            return f"{path.name} is corrupt: {type(error).__name__}"
        if content["random"] is not None:
            self.mols._random = tuple(content["random"])
        return None

    # ------------------------------------------------------------------ DeepSpeed's trap with several groups

    def _options(self) -> list[dict[str, Any]]:
        groups = self.mols.shards.inner.param_groups
        return [{k: v for k, v in group.items() if k != "params"} for group in groups]

    def _reapply(self, options: list[dict[str, Any]]) -> None:
        """A universal checkpoint gives every group the options of group 0 (seen at stage 3): put this run's back.

        The rates come from the scheduler's loaded state where it keeps them per group, else from this run's config.
        """
        scheduler = self.engine.lr_scheduler
        rates = list(getattr(scheduler, "_last_lr", None) or []) if scheduler is not None else []
        for i, (group, before) in enumerate(zip(self.mols.shards.inner.param_groups, options, strict=True)):
            group.update({k: v for k, v in before.items() if k != "step"})
            if len(rates) == len(options):
                group["lr"] = rates[i]
