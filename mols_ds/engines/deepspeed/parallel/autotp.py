"""DeepSpeed's AutoTP (module_inject/layers.py): a transformers model whose linears are split over tensor-parallel
ranks.

AutoTP notes on each split parameter how it did so ("restore" metadata for universal checkpoints). The note gives the
logical shape and this rank's part. Other parameters are copies on every tensor-parallel rank; the first rank counts
them.
"""

from __future__ import annotations

import math
import sys

from torch import nn

from mols_ds.core.config import MolsConfig
from mols_ds.core.groups import GroupTable, build_layouts
from mols_ds.engines.deepspeed.compat import AUTOTP, Engine, mpu_rank, mpu_size
from mols_ds.engines.deepspeed.parallel.base import ParallelGrid, Place, config_of, local_range, local_shape
from mols_ds.errors import MolsUnsupportedError


def tensor_parallel_size(engine: Engine) -> int:
    """Number of ranks of one data-parallel copy of the model, by `mpu` or by AutoTP."""
    if engine.mpu is None or hasattr(engine.mpu, "initialize_sequence_parallel"):  # the latter: Ulysses' own mpu
        return 1
    return mpu_size(engine.mpu)


def is_megatron(model: nn.Module) -> bool:
    """Whether the model has Megatron-core modules. Does not import Megatron-core."""
    if "megatron.core" not in sys.modules:
        return False
    return any(type(module).__module__.startswith("megatron.core.") for module in model.modules())


class AutoTpGrid(ParallelGrid):
    """Tensor and data parallelism by AutoTP. Raises `MolsUnsupportedError` for other tensor parallelism."""

    model_parallel = True

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.group = None
        self.world["tensor"] = tensor_parallel_size(engine)
        if int(engine.autotp_size() or 0) <= 1:
            raise MolsUnsupportedError(
                f"MoLS does not support tensor parallelism (mpu of size {self.world['tensor']}) of a model that is "
                "neither Megatron-core's nor split by AutoTP: the part of a parameter on a rank is unknown; use "
                'Megatron-core, "tensor_parallel": {"autotp_size": N}, or ZeRO data parallelism alone'
            )
        self._check_world()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._by_rows: set[str] = set()
        rank = mpu_rank(engine.mpu)
        self.places = {p: self._place(p, name, rank) for p, name in engine.param_names.items()}

    def _place(self, parameter: nn.Parameter, name: str, rank: int) -> Place:
        shape = local_shape(parameter)
        if not getattr(parameter, "tensor_model_parallel", False):
            self._note(parameter, name, shape)
            self._by_rows.add(name)
            return Place(local_range(parameter, name), rank == 0)
        cut = getattr(parameter, AUTOTP, None) or {}
        logical, dim, sizes = cut.get("logical_shape"), cut.get("partition_dim"), cut.get("partition_sizes")
        if logical is None:
            raise MolsUnsupportedError(
                f"MoLS does not support AutoTP's split of parameter {name!r} of shape {list(shape)}: it noted no "
                "logical shape; exclude the layer from AutoTP, or use ZeRO data parallelism alone"
            )
        self._note(parameter, name, tuple(int(size) for size in logical))
        if dim != 0 or sizes is None or cut.get("sub_param_sizes") is not None:
            self.columns[name] = 0 if dim == 0 else math.prod(shape[1:])
            return Place(local_range(parameter, name))
        self._by_rows.add(name)
        return Place(local_range(parameter, name, sum(sizes[:rank]) * math.prod(shape[1:])))

    def _note(self, parameter: nn.Parameter, name: str, shape: tuple[int, ...]) -> None:
        if parameter.requires_grad:
            self.shapes[name] = shape

    def _full_table(self, config: MolsConfig) -> GroupTable:
        model_config = config_of(self.engine.module)
        names = self.engine.param_names.values()
        layouts = build_layouts(self.shapes, model_config, config.rules, config.granularity, names=names)
        for name, layout in layouts.items():
            if len(layout.groups) > 1 and name not in self._by_rows:
                raise MolsUnsupportedError(
                    f"MoLS does not support AutoTP's split of parameter {name!r}, which has elements of "
                    f"{', '.join(layout.groups)}: give it one group with a rule, or use ZeRO data parallelism alone"
                )
        return GroupTable(layouts, self.shapes)
