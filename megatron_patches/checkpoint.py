"""MoLS state in Megatron's checkpoints (megatron.core.dist_checkpointing, torch_dist).

What is the same on every rank (phase, counters, alphas, report) rides in the optimizer's state dict under "mols" and is
saved with the common state. What differs by rank in a half-done calibration (accumulators, the random state that a
probe window gives back) is one `ShardedObject` a rank, under a key that holds the number of ranks: it is written only
in the middle of a calibration, and asked for only from a checkpoint that is known to have it.

Stock Megatron loads such a checkpoint and ignores both; a checkpoint without them loads here.
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
"""Counts of embedding and head may differ by this share: Megatron-LM pads the vocabulary by the TP size."""
METHODS = ("sharded_state_dict", "state_dict", "load_state_dict")
BY_RANK = re.compile(r"^(?:chained_0\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.")
"""Names of DistributedOptimizer's state of type dp_reshardable: one set for each tensor- and pipeline-parallel rank."""


def layout_problem(names: Sequence[str], *, distributed: bool, model_ranks: int) -> str | None:
    """Why an optimizer state of these names (dist_checkpointing's metadata) cannot be laid out for a run, or None.

    distributed: whether the run has Megatron's distributed optimizer; model_ranks: its tensor times pipeline size.
    (optimizer/distrib_optimizer.py and optimizer/optimizer.py of megatron-core 0.16.)
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
    """The dict of the state of the chained optimizers that ours is put into.

    Of several optimizers the first one's, because Megatron compares the number of entries of the outer dict with that
    of the optimizers.
    """
    host: dict[Any, Any] = state[0] if len(optimizer.chained_optimizers) > 1 else state
    return host


def split_state(optimizer: Any, state_dict: Any) -> tuple[Any, Any, Any]:
    """(the stock part, our common state, our accumulators); what was passed in is not changed."""
    if len(optimizer.chained_optimizers) > 1:
        state = dict(state_dict) if isinstance(state_dict, Mapping) else list(state_dict)
        state[0] = host = dict(state[0])
    else:
        state = host = dict(state_dict)
    return state, host.pop(KEY, None), host.pop(SAMPLES, None)


def _model_ranks() -> int:
    from megatron.core import parallel_state

    tensor, pipeline = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    return int(tensor * pipeline)


class MegatronCheckpoints:
    """Replaces the state-dict methods of one `ChainedOptimizer` instance until `remove()`.

    count_from: sets the number of updates that the session counts on from.
    """

    def __init__(
        self, mols: Session, optimizer: Any, window: MegatronWindow, count_from: Callable[[int], None]
    ) -> None:
        self.mols, self.optimizer, self.window, self.count_from = mols, optimizer, window, count_from
        self._wanted = False
        self._asked: Any = None  # the state dict of the load that is under way
        self._methods = ReplacedMethods(optimizer)
        self._stock = {name: self._methods.set(name, getattr(self, name)) for name in METHODS}

    def remove(self) -> None:
        """Give the optimizer its own methods back."""
        self._methods.undo()

    # ------------------------------------------------------------------ save

    def _common(self) -> dict[str, Any]:
        """What every rank has alike."""
        return {**self.mols.common_state(), "steps": self.mols.steps}

    def _host(self, state: Any) -> dict[Any, Any]:
        return state_host(self.optimizer, state)

    def sharded_state_dict(self, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        """`ChainedOptimizer.sharded_state_dict` with the MoLS state."""
        state = self._stock["sharded_state_dict"](model_sharded_state_dict, is_loading, **kwargs)
        host = self._host(state)
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
        """`ChainedOptimizer.state_dict` with the state that is common to all ranks (no accumulators)."""
        state = self._stock["state_dict"]()
        host = self._host(state)
        host[KEY] = self._common()
        return state

    # ------------------------------------------------------------------ load

    def resume_from(self, checkpoint_dir: Any) -> None:
        """See `MegatronMols.resume_from`.

        Raises `MolsCheckpointError` where there is no such checkpoint, and where its optimizer state cannot be laid out
        for this run, which Megatron itself says in many ways.
        """
        try:
            names = self._names(checkpoint_dir)
        except Exception as error:  # of many types: no folder, another format, a broken file
            raise MolsCheckpointError(
                f"resume_from: {checkpoint_dir} is no torch_dist checkpoint: {type(error).__name__}: {error}"
            ) from None
        self._refuse(names, checkpoint_dir)
        self._wanted = self._has_samples(names)

    def ask_in(self, whole: Mapping[Any, Any], checkpoint_dir: Any) -> None:
        """As `resume_from`, for a state dict that holds ours and that is about to be loaded."""
        if self._wanted or self._asked is None or not any(part is self._asked for part in whole.values()):
            return
        names: list[str] = []
        # What cannot be read here is Megatron's to complain about, or to load in another format.
        with contextlib.suppress(Exception):
            names = self._names(checkpoint_dir)
        self._refuse(names, checkpoint_dir)
        with contextlib.suppress(Exception):
            if self._has_samples(names):
                self._host(self._asked)[SAMPLES] = self._object(None)

    @staticmethod
    def _names(checkpoint_dir: Any) -> list[str]:
        """Of every tensor and object in a checkpoint."""
        from megatron.core.dist_checkpointing import serialization

        return list(serialization.load_sharded_metadata(str(checkpoint_dir)))

    @staticmethod
    def _has_samples(names: Iterable[str]) -> bool:
        """Whether a checkpoint holds the accumulators of a calibration on this number of ranks."""
        key = f"{SAMPLES}_of_{dist.get_world_size()}"
        return any(name == key or name.startswith(f"{key}/") for name in names)

    def _refuse(self, names: Sequence[str], checkpoint_dir: Any) -> None:
        """Raise `MolsCheckpointError` where these names are of an optimizer state that this run cannot take."""
        problem = layout_problem(
            names,
            distributed=any(type(o).__name__ == "DistributedOptimizer" for o in self.optimizer.chained_optimizers),
            model_ranks=_model_ranks(),
        )
        if problem is not None:
            raise MolsCheckpointError(f"{checkpoint_dir}: {problem}")

    def load_state_dict(self, state_dict: Any) -> None:
        """`ChainedOptimizer.load_state_dict`, then the MoLS state. Collective.

        - Same number of ranks and layout: goes on bit for bit; in the middle of a calibration after `resume_from`.
        - Another layout: alphas and ramp go on; a half-done calibration starts over, except in mode "moments".
        - A checkpoint without MoLS state: all multipliers are 1, the calibration starts where the schedule says, or at
          once where that step is past.

        Raises:
            MolsCheckpointError: the MoLS state is of other module groups, of another release or not MoLS's at all;
                nothing has been loaded then.
        """
        self._wanted, self._asked = False, None
        self._refuse_experts(state_dict)
        state, saved, samples = split_state(self.optimizer, state_dict)
        if saved is not None:
            saved = self._checked(saved)
        self._stock["load_state_dict"](state)
        self.window.forget()
        if saved is None:
            self._without_state()
            return
        steps = int(saved["steps"])
        self.count_from(steps if SINCE not in saved else max(steps, self._updates()))
        self.mols.resume(saved, self.mols.steps, lambda: self._continue(saved, samples))

    def _refuse_experts(self, state: Any) -> None:
        """Megatron keeps an optimizer of its own for experts that are dealt over ranks: two, or one, as saved."""
        mine = len(self.optimizer.chained_optimizers)
        numbered = len(state) if isinstance(state, list) else sum(isinstance(key, int) for key in state)
        saved = max(1, numbered)
        mixed = isinstance(state, Mapping) and 0 < numbered < len(state)  # a common state beside this run's own parts
        if saved == mine and not mixed:
            return
        raise MolsCheckpointError(
            f"this checkpoint holds the state of {'another number' if mixed else saved} of optimizers than this run "
            f"has ({mine}): Megatron-core does not move an optimizer between expert_model_parallel_size 1 and more; "
            "resume with experts dealt over ranks, or not, as they were, or load the weights alone"
        )

    def _updates(self) -> int:
        """Updates that the optimizer's state counts, the most of any rank. Collective."""
        mine = torch.zeros(dist.get_world_size(), dtype=torch.float64, device="cpu")
        mine[dist.get_rank()] = optimizer_steps(self.optimizer)
        return int(self.mols.reduce(mine).max())

    def _without_state(self) -> None:
        self.count_from(self._updates())
        self.mols.resume_without_state(self.mols.steps)

    def _checked(self, saved: Any) -> Any:
        saved = self._same_groups(saved)
        controller = self.mols.controller
        controller.check_saved(saved)
        for key, kind in (("steps", int), ("mode", str)):
            if not isinstance(saved.get(key), kind):
                raise MolsCheckpointError(f"the MoLS state of this checkpoint has no usable {key}: {saved.get(key)!r}")
        return saved

    def _same_groups(self, saved: Any) -> Any:
        """The saved state with this run's element counts where only the padding of the vocabulary differs."""
        here = self.mols.controller.table.elements
        groups = saved.get("groups") if isinstance(saved, Mapping) else None
        if not isinstance(groups, Mapping) or set(groups) != set(here) or dict(groups) == dict(here):
            return saved
        padded = {group for group in here if groups[group] != here[group]}
        close = all(abs(groups[group] - here[group]) <= PADDING * here[group] for group in padded)
        if not (close and padded <= {"embedding", "head"}):
            return saved
        self.mols.controller.log(
            f"MoLS: the vocabulary of the checkpoint is padded otherwise ({', '.join(sorted(padded))}); alphas are kept"
        )
        return {**saved, "groups": dict(here)}

    def _continue(self, saved: Mapping[str, Any], samples: Any) -> str | None:
        """Go on with a half-done calibration; returns why that cannot be, the same on every rank, or None."""
        mols = self.mols
        started = mols.controller.state.samples > 0
        if mols.config.mode == "moments":
            return None  # its only state is Adam's
        problem = None
        if samples is None:
            of, world = saved.get("samples_of"), dist.get_world_size()
            if SINCE in saved:
                problem = "MoLS was off in between"
            elif of is None:
                problem = (
                    "its accumulators are not in it, because it was saved by optimizer.state_dict() (Megatron-LM: "
                    "--ckpt-format torch), which holds what all ranks have alike: save as torch_dist"
                )
            elif of != world:
                problem = f"it was saved by {of} ranks, these are {world}"
            else:
                problem = (
                    "its accumulators were not asked for: call mols.resume_from(checkpoint_dir) before "
                    "optimizer.sharded_state_dict(..., is_loading=True), or use megatron_patches.apply()"
                )
        else:
            try:
                self._load_window(samples["random"])
                if samples["samples"] is not None:
                    mols.controller.elements.load_state_dict(samples["samples"])
            except Exception as error:  # a corrupt object raises many types; the other ranks must hear of it
                problem = str(error) if isinstance(error, MolsCheckpointError) else f"{type(error).__name__}: {error}"
        if mols.agree(problem is None):
            return None
        return (problem or "another rank's accumulators do not fit it (another layout)") if started else None

    def _load_window(self, saved: Any) -> None:
        """What this rank gives back at the end of the window; of 0.4.0: a `RandomState`."""
        if saved is not None and "torch" in saved:
            self.window.load_0_4_0(saved["torch"], saved)
        else:
            self.window.load_state_dict(saved)
