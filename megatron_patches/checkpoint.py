"""MoLS state in Megatron's checkpoints (megatron.core.dist_checkpointing, torch_dist).

State that all ranks share (phase, counters, alphas, report) is saved in the common state, under "mols" in the
optimizer's state dict. State of one rank in an unfinished calibration (accumulators, the RNG state before a probe
window) is one `ShardedObject` per rank. Its key has the number of ranks. It is saved only during a calibration, and
requested only from a checkpoint that has it.

Stock Megatron loads such a checkpoint and ignores both. A checkpoint without them loads here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from megatron_patches.probe_window import MegatronWindow
from megatron_patches.schedule import optimizer_steps
from mols_ds.core.replaced_methods import ReplacedMethods
from mols_ds.core.state_check import SINCE
from mols_ds.errors import MolsCheckpointError

if TYPE_CHECKING:
    from mols_ds.core.session import Session

KEY, SAMPLES = "mols", "mols_samples"
PADDING = 0.02
"""Largest relative difference in the counts of embedding and head: Megatron-LM pads the vocabulary by the TP size."""
METHODS = ("sharded_state_dict", "state_dict", "load_state_dict")
BY_RANK = re.compile(r"^(?:chained_0\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.")
"""Names of DistributedOptimizer's state of type dp_reshardable: one set per tensor- and pipeline-parallel rank."""


def layout_problem(names: Sequence[str], *, distributed: bool, model_ranks: int) -> str | None:
    """Return why a run cannot load an optimizer state, or None. Source: optimizer/*.py of megatron-core 0.16.

    Args:
        names: of the tensors and objects in the checkpoint (dist_checkpointing's metadata).
        distributed: whether the run has Megatron's distributed optimizer.
        model_ranks: tensor-parallel times pipeline-parallel size of the run.
    """
    groups = {match[1] for match in map(BY_RANK.match, names) if match}
    whole = any(name.startswith("optimizer.state.param.") for name in names)
    plain = not groups and not whole and any(name.startswith("optimizer.state.") for name in names)
    if (plain and distributed) or ((groups or whole) and not distributed):
        said = ("without", "with") if plain else ("with", "without")
        return (
            f"it was saved {said[0]} the distributed optimizer, this run is {said[1]} it, and Megatron-core moves no "
            "optimizer state between these: set use_distributed_optimizer as it was, or load the weights alone"
        )
    if groups and len(groups) != model_ranks:
        return (
            f"its optimizer state is dp_reshardable, of {len(groups)} tensor- and pipeline-parallel ranks; this run "
            f"has {model_ranks}. Only another number of data-parallel ranks can load it: resume with the same tensor "
            "and pipeline size and save as fully_reshardable there (run.reshardable_checkpoints: true; Megatron-LM: "
            "--dist-ckpt-optim-fully-reshardable)"
        )
    return None


def state_host(optimizer: Any, state: Any) -> dict[Any, Any]:
    """Return the dict, in the chained optimizers' state, that has the MoLS state.

    With several optimizers it is the first one's dict: Megatron compares the number of entries of the outer dict with
    the number of optimizers.
    """
    host: dict[Any, Any] = state[0] if len(optimizer.chained_optimizers) > 1 else state
    return host


def split_state(optimizer: Any, state_dict: Any) -> tuple[Any, Any, Any]:
    """Separate MoLS' state from a state dict, without modifying it.

    Args:
        optimizer: the ChainedOptimizer.
        state_dict: its state dict, or the one that is loaded.

    Returns:
        (stock state, common state of MoLS, accumulators of this rank).
    """
    if len(optimizer.chained_optimizers) > 1:
        state = dict(state_dict) if isinstance(state_dict, Mapping) else list(state_dict)
        state[0] = host = dict(state[0])
    else:
        state = host = dict(state_dict)
    return state, host.pop(KEY, None), host.pop(SAMPLES, None)


class MegatronCheckpoints:
    """Replace the state-dict methods of one `ChainedOptimizer` instance until `remove()`.

    count_from: sets the session's number of updates.
    """

    def __init__(
        self, mols: Session, optimizer: Any, window: MegatronWindow, count_from: Callable[[int], None]
    ) -> None:
        self.mols, self.optimizer, self.window, self.count_from = mols, optimizer, window, count_from
        self._wanted = False
        self._asked: Any = None  # the state dict of the current load
        self._methods = ReplacedMethods(optimizer)
        self._stock = {name: self._methods.set(name, getattr(self, name)) for name in METHODS}

    def remove(self) -> None:
        """Restore the optimizer's methods."""
        self._methods.undo()

    # ------------------------------------------------------------------ save

    def _common(self) -> dict[str, Any]:
        """Return the state that is equal on all ranks."""
        return {**self.mols.common_state(), "steps": self.mols.steps}

    def sharded_state_dict(self, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        """Return the state of `ChainedOptimizer.sharded_state_dict` with the MoLS state."""
        state = self._stock["sharded_state_dict"](model_sharded_state_dict, is_loading, **kwargs)
        host = state_host(self.optimizer, state)
        if is_loading:
            self._asked = state
            if self._wanted:
                host[SAMPLES] = self._object(None)
            return state
        host[KEY] = self._common()
        if self.mols.controller.measuring:
            self.window.close_batch()  # the model's state dict holds the tensors, not copies
            samples, random = self.mols.controller.elements.state_dict(), self.window.state_dict()
            host[KEY]["samples_of"] = dist.get_world_size()
            host[SAMPLES] = self._object({"samples": samples, "random": random})
        return state

    def _object(self, data: Any) -> Any:
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        world = dist.get_world_size()
        return ShardedObject(f"{SAMPLES}_of_{world}", data, (world,), (dist.get_rank(),), replica_id=0)

    def state_dict(self) -> Any:
        """Return the state of `ChainedOptimizer.state_dict` with the common MoLS state (no accumulators)."""
        state = self._stock["state_dict"]()
        host = state_host(self.optimizer, state)
        host[KEY] = self._common()
        return state

    # ------------------------------------------------------------------ load

    def resume_from(self, checkpoint_dir: Any) -> None:
        """See `MegatronMols.resume_from`.

        Raises `MolsCheckpointError` for a missing checkpoint, and for an optimizer state that this run cannot load.
        Megatron's own errors for the latter differ from case to case.
        """
        try:
            names = self._names(checkpoint_dir)
        except Exception as error:  # many types: missing folder, another format, corrupt file
            raise MolsCheckpointError(
                f"resume_from: {checkpoint_dir} is not a torch_dist checkpoint: {type(error).__name__}: {error}"
            ) from None
        self._refuse(names, checkpoint_dir)
        self._wanted = self._has_samples(names)

    def ask_in(self, whole: Mapping[Any, Any], checkpoint_dir: Any) -> None:
        """Do the same as `resume_from` for a state dict with ours that is about to be loaded."""
        if self._wanted or self._asked is None or not any(part is self._asked for part in whole.values()):
            return
        names: list[str] = []
        # Unreadable here: Megatron raises, or loads another format.
        with contextlib.suppress(Exception):
            names = self._names(checkpoint_dir)
        self._refuse(names, checkpoint_dir)
        with contextlib.suppress(Exception):
            if self._has_samples(names):
                state_host(self.optimizer, self._asked)[SAMPLES] = self._object(None)

    @staticmethod
    def _names(checkpoint_dir: Any) -> list[str]:
        """Return the names of every tensor and object in a checkpoint."""
        from megatron.core.dist_checkpointing import serialization

        return list(serialization.load_sharded_metadata(str(checkpoint_dir)))

    @staticmethod
    def _has_samples(names: Iterable[str]) -> bool:
        """Return whether a checkpoint has the accumulators of a calibration on this number of ranks."""
        key = f"{SAMPLES}_of_{dist.get_world_size()}"
        return any(name == key or name.startswith(f"{key}/") for name in names)

    def _refuse(self, names: Sequence[str], checkpoint_dir: Any) -> None:
        """Raise `MolsCheckpointError` for names of an optimizer state that this run cannot load."""
        from megatron.core import parallel_state

        tensor, pipeline = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        )
        distributed = any(type(o).__name__ == "DistributedOptimizer" for o in self.optimizer.chained_optimizers)
        problem = layout_problem(names, distributed=distributed, model_ranks=tensor * pipeline)
        if problem is not None:
            raise MolsCheckpointError(f"{checkpoint_dir}: {problem}")

    def load_state_dict(self, state_dict: Any) -> None:
        """Load with `ChainedOptimizer.load_state_dict`, then load the MoLS state. Collective.

        - Same number of ranks and layout: continues bit for bit; during a calibration only after `resume_from`.
        - Another layout: alphas and ramp continue; an unfinished calibration restarts, except in mode "moments".
        - A checkpoint without MoLS state: all multipliers are 1. The calibration starts at its scheduled step, or
          immediately after that step.

        Raises:
            MolsCheckpointError: MoLS state with other module groups, from another release or corrupt. Nothing is
                loaded then.
        """
        self._wanted, self._asked = False, None
        self._refuse_experts(state_dict)
        state, saved, samples = split_state(self.optimizer, state_dict)
        if saved is not None:
            saved = self._checked(saved)
        self._stock["load_state_dict"](state)
        self.window.forget()
        if saved is None:
            self.count_from(self._updates())
            self.mols.resume_without_state(self.mols.steps)
            return
        steps = int(saved["steps"])
        self.count_from(steps if SINCE not in saved else max(steps, self._updates()))
        self.mols.resume(saved, self.mols.steps, lambda: self._continue(saved, samples))

    def _refuse_experts(self, state: Any) -> None:
        """Raise for another number of chained optimizers: experts sharded over ranks have their own optimizer."""
        mine = len(self.optimizer.chained_optimizers)
        numbered = len(state) if isinstance(state, list) else sum(isinstance(key, int) for key in state)
        saved = max(1, numbered)
        mixed = isinstance(state, Mapping) and 0 < numbered < len(state)  # common state next to this run's parts
        if saved == mine and not mixed:
            return
        raise MolsCheckpointError(
            f"this checkpoint has the state of {'another number' if mixed else saved} of optimizers than this run "
            f"has ({mine}): Megatron-core does not move an optimizer between expert_model_parallel_size 1 and more; "
            "resume with size 1, or above 1, as in the checkpoint, or load the weights alone"
        )

    def _updates(self) -> int:
        """Return the number of updates in the optimizer's state, the maximum over ranks. Collective."""
        mine = torch.zeros(dist.get_world_size(), dtype=torch.float64, device="cpu")
        mine[dist.get_rank()] = optimizer_steps(self.optimizer)
        return int(self.mols.reduce(mine).max())

    def _checked(self, saved: Any) -> Any:
        saved = self._same_groups(saved)
        controller = self.mols.controller
        controller.check_saved(saved)
        for key, kind in (("steps", int), ("mode", str)):
            if not isinstance(saved.get(key), kind):
                raise MolsCheckpointError(f"the MoLS state of this checkpoint has no usable {key}: {saved.get(key)!r}")
        return saved

    def _same_groups(self, saved: Any) -> Any:
        """Return the saved state, with this run's element counts where only the vocabulary's padding differs."""
        here = self.mols.controller.table.elements
        groups = saved.get("groups") if isinstance(saved, Mapping) else None
        if not isinstance(groups, Mapping) or set(groups) != set(here) or dict(groups) == dict(here):
            return saved
        padded = {group for group in here if groups[group] != here[group]}
        close = all(abs(groups[group] - here[group]) <= PADDING * here[group] for group in padded)
        if not (close and padded <= {"embedding", "head"}):
            return saved
        self.mols.controller.log(
            f"MoLS: the vocabulary of the checkpoint has other padding ({', '.join(sorted(padded))}); alphas are kept"
        )
        return {**saved, "groups": dict(here)}

    def _continue(self, saved: Mapping[str, Any], samples: Any) -> str | None:
        """Continue an unfinished calibration. Return why it cannot continue, the same on every rank, or None."""
        mols = self.mols
        started = mols.controller.state.samples > 0
        if mols.config.mode == "moments":
            return None  # uses only Adam's state
        problem = None
        if samples is None:
            of, world = saved.get("samples_of"), dist.get_world_size()
            if SINCE in saved:
                problem = "MoLS was off in the meantime"
            elif of is None:
                problem = (
                    "its accumulators are not in it, because it was saved by optimizer.state_dict() (Megatron-LM: "
                    "--ckpt-format torch), which holds only the state common to all ranks: save as torch_dist"
                )
            elif of != world:
                problem = f"it was saved by {of} ranks, these are {world}"
            else:
                problem = (
                    "its accumulators were not requested: call mols.resume_from(checkpoint_dir) before "
                    "optimizer.sharded_state_dict(..., is_loading=True), or use megatron_patches.apply()"
                )
        else:
            try:
                random = samples["random"]  # restored at the end of the window; 0.4.0 saved a `RandomState`
                if random is not None and "torch" in random:
                    self.window.load_0_4_0(random["torch"], random)
                else:
                    self.window.load_state_dict(random)
                if samples["samples"] is not None:
                    mols.controller.elements.load_state_dict(samples["samples"])
            except Exception as error:  # a corrupt object raises many types; all ranks need the error
                problem = str(error) if isinstance(error, MolsCheckpointError) else f"{type(error).__name__}: {error}"
        if mols.agree(problem is None):
            return None
        return (problem or "another rank's accumulators do not fit it (another layout)") if started else None
