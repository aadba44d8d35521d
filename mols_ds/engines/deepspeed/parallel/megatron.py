"""A DeepSpeed engine with a Megatron-core model: tensor and data parallelism, ZeRO stages 0 to 3.

`megatron_patches` maps local parameters to logical ones and elements to groups. This module is imported only for a
model with Megatron-core modules.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core import parallel_state
from torch import nn

from megatron_patches.compat import UNDER_DEEPSPEED, check_modules
from megatron_patches.group_rules import frozen_names
from megatron_patches.param_map import (
    LogicalModel,
    ProcessGrid,
    configs_of,
    current_grid,
    local_layout,
    local_parameters,
)
from megatron_patches.rng_state import set_tracker_states, tracker_states
from megatron_patches.trackers import trackers
from mols_ds.core.config import MolsConfig
from mols_ds.core.group_rules import config_value
from mols_ds.core.groups import GroupTable
from mols_ds.core.module_state import Tracker
from mols_ds.engines.deepspeed.compat import Engine
from mols_ds.engines.deepspeed.parallel.autotp import tensor_parallel_size
from mols_ds.engines.deepspeed.parallel.base import ParallelGrid, Place
from mols_ds.errors import MolsUnsupportedError


class MegatronGrid(ParallelGrid):
    """Tensor and data parallelism of a Megatron-core model.

    Raises:
        MolsUnsupportedError: a grid or setting whose gradients DeepSpeed does not reduce as Megatron does; named.
    """

    packages = ("deepspeed", "megatron-core")

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        check_modules(UNDER_DEEPSPEED)
        self.config = _config_of(engine.module)
        processes = current_grid()
        _check(engine, processes, self.config)
        self.model_parallel = processes.tensor > 1
        self.world["tensor"] = processes.tensor
        if self.model_parallel:
            self.group = None
            self._check_world()
        self.locals = local_parameters([engine.module], processes)
        shapes = {local.name: local.shape for local in self.locals}
        self.logical = LogicalModel(shapes, configs_of([engine.module]), frozen_names(engine.module))
        self.places |= {local.parameter: Place(local.range, local.counted) for local in self.locals}

    def begin_window(self) -> None:
        """Save the RNG state that Megatron keeps for dropout inside tensor-parallel regions."""
        self.window = {"tracker": tracker_states()}

    def end_window(self) -> None:
        window, self.window = self.window, None
        if window is not None:
            set_tracker_states(window["tracker"])

    def trackers(self) -> Sequence[Tracker]:
        return trackers()

    def _full_table(self, config: MolsConfig) -> GroupTable:
        table = self.logical.table(self.config, config.rules, config.granularity)
        for local in self.locals:
            local_layout(local, table.layouts)
        return table


def _config_of(model: nn.Module) -> object | None:
    configs = (getattr(module, "config", None) for module in model.modules())
    return next((config for config in configs if config_value(config, "num_attention_heads") is not None), None)


def _check(engine: Engine, processes: ProcessGrid, config: object | None) -> None:
    """Refuse unsupported settings. Each entry: (whether it applies, what is not supported, what to do)."""
    tensor = processes.tensor > 1
    summed = [
        name
        for name, p in engine.module.named_parameters()
        if getattr(p, "sequence_parallel", False) or getattr(p, "average_gradients_across_tp_domain", False)
    ]
    refusals = [
        (
            processes.pipeline > 1,
            "Megatron's pipeline parallelism, whose schedules DeepSpeed does not run",
            "use pipeline_model_parallel_size 1, DeepSpeed's PipelineModule, or Megatron's own optimizer",
        ),
        (
            parallel_state.get_context_parallel_world_size() > 1,
            "Megatron's context parallelism, over whose ranks DeepSpeed does not reduce gradients",
            "use context_parallel_size 1, or Megatron's own optimizer",
        ),
        (
            processes.expert > 1,
            "Megatron's expert parallelism, over whose ranks DeepSpeed does not reduce gradients",
            "use expert_model_parallel_size 1, or Megatron's own optimizer",
        ),
        (
            tensor_parallel_size(engine) != processes.tensor,
            f"a model split over {processes.tensor} tensor-parallel ranks in an engine that does not know it",
            "pass mpu=megatron_patches.mpu.DeepSpeedMpu() to initialize",
        ),
        (
            tensor and (bool(config_value(config, "sequence_parallel")) or bool(summed)),
            f"sequence parallelism ({summed[0] if summed else 'sequence_parallel'}), whose norms' gradients DeepSpeed "
            "does not sum over the tensor-parallel ranks",
            "set sequence_parallel=False",
        ),
        (
            tensor and bool(config_value(config, "qk_layernorm")),
            "qk_layernorm with tensor parallelism, whose gradients DeepSpeed does not sum over those ranks",
            "set qk_layernorm=False, or tensor_model_parallel_size 1",
        ),
        (
            tensor and bool(config_value(config, "num_moe_experts")),
            "experts with tensor parallelism, which need sequence parallelism",
            "use tensor_model_parallel_size 1",
        ),
        (
            bool(config_value(config, "gradient_accumulation_fusion")),
            "gradient_accumulation_fusion, which writes gradients where DeepSpeed does not read them",
            "set gradient_accumulation_fusion=False",
        ),
    ]
    for refuse, what, way_out in refusals:
        if refuse:
            raise MolsUnsupportedError(f"MoLS on DeepSpeed does not support {what}: {way_out}")
