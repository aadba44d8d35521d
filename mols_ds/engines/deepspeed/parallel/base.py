"""Which ranks hold what: the process grid of a DeepSpeed engine, and the logical model behind the local parameters.

A *logical* parameter is what one rank would hold without parallelism. Under data parallelism that is what every rank
holds (ZeRO's shards are cut from it, see shards.py). Under tensor parallelism a local parameter is a range of a logical
one or a copy of it, under pipeline parallelism a rank holds some of them only. All groups, layouts and counts are those
of the logical model, so the table is the same on every rank.
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
    """Which range of which logical parameter a local parameter is.

    counted: whether this rank's copy is the one that is counted among copies over tensor- and pipeline-parallel ranks
    (data-parallel copies are another matter, see shards.py).
    """

    range: ParamRange
    counted: bool = True


class ParallelGrid:
    """Data parallelism alone, and the base of the other grids.

    Attributes:
        places: trainable and other parameters of this rank -> their place.
        group: the ranks whose owned elements are disjoint; None is every rank.
        world: sizes for the report.
        model_parallel: whether ranks hold different parameters (or parts of them), so that one rank's finite gradients
            say nothing of another's.
        counts_micro_steps: whether the engine counts micro-batches around `_take_model_step`.
        window: what `end_window` puts back; numbers and tensors alone, since it goes into checkpoints. None outside.
        packages: whose versions stand in the report.
        lr_groups: logical parameter -> index of its group in this rank's optimizer, as far as it is known; filled by
            `table`.
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
        self.window: Any = None

    @property
    def rank(self) -> int:
        """This rank's number among those of `group`."""
        return int(dist.get_rank(self.group))

    @property
    def size(self) -> int:
        """Number of ranks in `group`."""
        return int(dist.get_world_size(self.group))

    def table(self, config: MolsConfig, param_group: Mapping[str, int]) -> GroupTable:
        """The groups of the logical parameters that the optimizers hold; collective under pipeline parallelism.

        param_group: logical parameter of this rank's optimizer -> index of its parameter group.
        Raises MolsConfigError as `mols_ds.group_table`, on every rank.
        """
        full = self._full_table(config)
        self.lr_groups = dict(param_group)
        return self._held(full, param_group)

    def _full_table(self, config: MolsConfig) -> GroupTable:
        return group_table(self.engine.module, config.rules, config.granularity)

    def _held(self, full: GroupTable, held: Mapping[str, int]) -> GroupTable:
        """`full` without the parameters that no optimizer holds; they are named in a warning."""
        left_out = [name for name in full.layouts if name not in held]
        if left_out and self.engine.global_rank == 0:
            warn_here(
                f"{len(left_out)} trainable parameters are not in the optimizer, left alone: {left_out[:3]}",
                stacklevel=6,
            )
        return GroupTable(
            {name: layout for name, layout in full.layouts.items() if name in held},
            {name: shape for name, shape in full.shapes.items() if name in held},
        )

    def begin_window(self) -> None:
        """Before the first forward pass of a probe window: remember what forward passes advance, beside torch's own
        random state."""

    def end_window(self) -> None:
        """After the last batch of a probe window: put it back."""

    def trackers(self) -> Sequence[Tracker]:
        """Sums for logging that forward passes add to, outside of the modules."""
        return ()

    def _check_world(self) -> None:
        """The statistics are summed over every rank: the grid must be all of them."""
        ranks = math.prod(self.world.values())
        if ranks != dist.get_world_size():
            sizes = ", ".join(f"{name} {size}" for name, size in self.world.items())
            raise MolsUnsupportedError(
                f"MoLS does not support a process grid ({sizes}) of {ranks} ranks in a job of {dist.get_world_size()}: "
                "use data, tensor and pipeline parallelism alone"
            )


def local_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """This rank's shape of a parameter; at ZeRO stage 3 that before it was partitioned."""
    return tuple(int(size) for size in getattr(parameter, "ds_shape", parameter.shape))


def local_range(parameter: nn.Parameter, name: str, start: int = 0) -> ParamRange:
    """This rank's elements of a parameter as those from `start` on of the logical parameter `name`."""
    return ParamRange(name, start, math.prod(local_shape(parameter)))


def whole_places(engine: Engine) -> dict[nn.Parameter, Place]:
    """The places of all parameters under data parallelism alone: each is a whole logical parameter."""
    return {p: Place(local_range(p, name)) for p, name in engine.param_names.items()}


def config_of(module: nn.Module) -> object | None:
    """The transformers config of the first layer that carries one."""
    configs = (getattr(part, "config", None) for part in module.modules())
    return next((config for config in configs if config_value(config, "model_type") is not None), None)
