"""Content of train_megatron.py's checkpoints, in Megatron's dist_checkpointing format (torch_dist).

`mols_ds.training.checkpointer` names, checks and replaces them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from megatron_patches.rng_state import RandomState
from mols_ds.core.handle import Handle
from mols_ds.core.json_types import JsonObject
from mols_ds.errors import MolsCheckpointError
from mols_ds.training.megatron_build import Built
from mols_ds.training.sources import one_line

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.models.gpt import GPTModel

ShardedState = dict[str, Any]
"""A sharded state dict of Megatron's dist_checkpointing."""

SHARDING = {
    # Each rank writes its own slices: no gather, any number of data-parallel ranks can load them
    False: {"distrib_optim_sharding_type": "dp_reshardable"},
    # Data-parallel rank 0 gathers and writes whole tensors: any grid can load it
    True: {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    },
}
"""Metadata of DistributedOptimizer.sharded_state_dict, by `run.reshardable_checkpoints`."""


class TorchDistCheckpoint:
    """Write and load one arm's model, optimizer, scheduler and RNG state. Every call is collective.

    Attributes:
        metadata: of the sharding. A resumed run uses its checkpoint's.
    """

    def __init__(self, built: Built, mols: Handle, *, reshardable: bool) -> None:
        self.built, self.mols = built, mols
        self.metadata = SHARDING[reshardable]

    def writer(self, counted: JsonObject) -> Callable[[Path], None]:
        """Copy the state now. Returns a function that writes it, with `counted`, into a folder."""
        from megatron.core import dist_checkpointing

        state = self._state(is_loading=False) | {"job": counted}

        def write(place: Path) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dist_checkpointing.save(state, str(place), content_metadata=self.metadata)

        return write

    def load(self, folder: Path, tag: str) -> JsonObject | None:
        """Load checkpoint `tag` of `folder`. Returns its `counted`; None for another program's checkpoint.

        Raises:
            MolsCheckpointError: it cannot be loaded.
        """
        from megatron.core import dist_checkpointing

        place = folder / tag
        try:
            self.mols.resume_from(str(place))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.metadata = dist_checkpointing.load_content_metadata(str(place)) or self.metadata
                wanted = self._state(is_loading=True)
                if not self._has(place, wanted["random"].key):
                    del wanted["random"]  # written by another number of ranks: start with new generators
                loaded = dist_checkpointing.load(wanted, str(place))
        except MolsCheckpointError:
            raise
        except Exception as error:  # Megatron and torch raise a dozen unrelated types for a broken checkpoint
            raise MolsCheckpointError(f"--resume: {folder} cannot be loaded: {one_line(error)}") from error
        if "job" not in loaded:
            return None
        for number, model in enumerate(self._models()):
            model.load_state_dict(loaded[self._name(number)])
        with torch.no_grad():  # fp32 weights are their own main parameters, which Megatron copies into
            self.built.optimizer.load_state_dict(loaded["optimizer"])
        self.built.scheduler.load_state_dict(loaded["scheduler"])
        state = RandomState()
        state.saved = loaded.get("random")
        state.restore()
        counted: JsonObject = loaded["job"]
        return counted

    def _models(self) -> list[GPTModel]:
        """The unwrapped GPTModels: wrappers would prefix the names with `module.`."""
        from megatron.core.utils import unwrap_model

        models: list[GPTModel] = unwrap_model(self.built.chunks)
        return models

    @staticmethod
    def _has(place: Path, key: str) -> bool:
        from megatron.core.dist_checkpointing import serialization

        found = serialization.load_sharded_metadata(str(place))
        return any(name == key or name.startswith(f"{key}/") for name in found)

    def _name(self, number: int) -> str:
        """Megatron-LM's key of a model chunk."""
        return "model" if len(self.built.chunks) == 1 else f"model{number}"

    def _state(self, *, is_loading: bool) -> ShardedState:
        built = self.built
        models = {
            self._name(number): model.sharded_state_dict(metadata=self.metadata)
            for number, model in enumerate(self._models())
        }
        optimizer = built.optimizer.sharded_state_dict(
            models if len(models) > 1 else models["model"], is_loading=is_loading, metadata=self.metadata
        )
        state = {**models, "optimizer": optimizer, "random": self._random()}
        return state if is_loading else state | {"scheduler": built.scheduler.state_dict()}

    @staticmethod
    def _random() -> ShardedObject:
        """RNG state of this rank: one object per rank, which another number of ranks cannot load."""
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        state = RandomState()
        state.remember()
        world = dist.get_world_size()
        return ShardedObject(f"random_of_{world}", state.saved, (world,), (dist.get_rank(),), replica_id=0)
