"""The process grid of a DeepSpeed engine, and the logical model behind its local parameters.

A *logical* parameter is what one rank would have without parallelism. Under data parallelism every rank has it (and
ZeRO shards it, see shards.py). Under tensor parallelism a local parameter is a range or a copy of a logical one. Under
pipeline parallelism a rank has only some of them. Groups, layouts and counts are of the logical model, so the table is
the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deepspeed import comm as dist
from torch import nn

from mols_ds.core.config import MolsConfig
from mols_ds.core.group_rules import config_value
from mols_ds.core.groups import GroupTable, group_table
from mols_ds.core.log import warn_here
from mols_ds.core.module_state import Tracker
from mols_ds.core.ranges import ParamRange
from mols_ds.engines.deepspeed.compat import Engine
from mols_ds.errors import MolsUnsupportedError


class Place(NamedTuple):
    """Range of a logical parameter that a local parameter is.

    counted: this rank's copy is the one that counts among copies over tensor- and pipeline-parallel ranks
    (data-parallel copies: see shards.py).
    """

    range: ParamRange
    counted: bool = True


class ParallelGrid:
    """Data parallelism alone, and base class of the other grids.

    Attributes:
        places: parameters of this rank (trainable or not) -> their place.
        group: ranks with disjoint owned elements; None: every rank.
        world: sizes for the report.
        model_parallel: ranks have different parameters (or parts), so finite gradients on one rank say nothing about
            another.
        counts_micro_steps: the engine counts micro-batches around `_take_model_step`.
        window: numbers and tensors that `end_window` restores; saved in checkpoints. None outside a window.
        packages: their versions are in the report.
        columns: parameter whose columns are split among ranks -> this rank's number of columns;
            0 for unknown rows.
        lr_groups: logical parameter -> index of its group in this rank's optimizer, if known; set by `table`.
    """

    model_parallel = False
    counts_micro_steps = True
    packages: tuple[str, ...] = ("deepspeed", "transformers")

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.group: Any = engine.seq_data_parallel_group
        self.world = {"data": dist.get_world_size(engine.seq_data_parallel_group)}
        self.world |= {"tensor": 1, "pipeline": 1, "expert": 1}
        self.places = whole_places(engine)
        self.lr_groups: dict[str, int] = {}
        self.columns: dict[str, int] = {}
        self.window: Any = None

    @property
    def rank(self) -> int:
        """This rank's index in `group`."""
        return int(dist.get_rank(self.group))

    @property
    def size(self) -> int:
        """Number of ranks in `group`."""
        return int(dist.get_world_size(self.group))

    def table(self, config: MolsConfig, param_group: Mapping[str, int]) -> GroupTable:
        """Build the groups of the logical parameters in the optimizers. Collective under pipeline parallelism.

        Args:
            config: the "mols" section.
            param_group: logical parameter of this rank's optimizer -> index of its parameter group.

        Raises:
            MolsConfigError: as `mols_ds.group_table`, on every rank.
        """
        full = self._full_table(config)
        self.lr_groups = dict(param_group)
        return self._held(full, param_group)

    def _full_table(self, config: MolsConfig) -> GroupTable:
        return group_table(self.engine.module, config.rules, config.granularity)

    def _held(self, full: GroupTable, held: Mapping[str, int]) -> GroupTable:
        """Return `full` without the parameters of no optimizer; warns about them."""
        left_out = [name for name in full.layouts if name not in held]
        if left_out and self.engine.global_rank == 0:
            warn_here(
                f"{len(left_out)} trainable parameters are not in the optimizer and stay unscaled: {left_out[:3]}",
                stacklevel=6,
            )
        return GroupTable(
            {name: layout for name, layout in full.layouts.items() if name in held},
            {name: shape for name, shape in full.shapes.items() if name in held},
        )

    def begin_window(self) -> None:
        """Save what forward passes advance, beside torch's own RNG state. Call before a window's first forward pass."""

    def end_window(self) -> None:
        """Restore it after the last batch of a probe window."""

    def trackers(self) -> Sequence[Tracker]:
        """Sums for logging outside of the modules that forward passes change."""
        return ()

    def _check_world(self) -> None:
        """Check that the grid has all ranks: statistics are summed over every rank."""
        ranks = math.prod(self.world.values())
        if ranks != dist.get_world_size():
            sizes = ", ".join(f"{name} {size}" for name, size in self.world.items())
            raise MolsUnsupportedError(
                f"MoLS does not support a process grid ({sizes}) of {ranks} ranks in a job of {dist.get_world_size()}: "
                "use data, tensor and pipeline parallelism alone"
            )


def local_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """This rank's shape of a parameter; at ZeRO stage 3 its shape before partitioning."""
    return tuple(int(size) for size in getattr(parameter, "ds_shape", parameter.shape))


def local_range(parameter: nn.Parameter, name: str, start: int = 0) -> ParamRange:
    """This rank's elements of a parameter as a range from `start` on of the logical parameter `name`."""
    return ParamRange(name, start, math.prod(local_shape(parameter)))


def whole_places(engine: Engine) -> dict[nn.Parameter, Place]:
    """Places of all parameters under data parallelism: each is a whole logical parameter."""
    return {p: Place(local_range(p, name)) for p, name in engine.param_names.items()}


def config_of(module: nn.Module) -> object | None:
    """The transformers config of the first layer that has one."""
    configs = (getattr(part, "config", None) for part in module.modules())
    return next((config for config in configs if config_value(config, "model_type") is not None), None)
