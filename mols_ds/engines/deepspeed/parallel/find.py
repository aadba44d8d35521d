"""Find the process grid of a DeepSpeed engine: one class per way to distribute a model."""

from __future__ import annotations

from typing import cast

from mols_ds.engines.deepspeed.compat import Engine, PipelineEngine
from mols_ds.engines.deepspeed.parallel.autotp import AutoTpGrid, is_megatron, tensor_parallel_size
from mols_ds.engines.deepspeed.parallel.base import ParallelGrid
from mols_ds.engines.deepspeed.parallel.pipeline import PipelineGrid


def find_grid(engine: Engine) -> ParallelGrid:
    """Return the grid of this engine. Raises `MolsUnsupportedError` with what to do for an unsupported one."""
    if engine.pipeline_parallelism:
        return PipelineGrid(cast(PipelineEngine, engine))
    if is_megatron(engine.module):
        # Imports Megatron-core, which is optional.
        from mols_ds.engines.deepspeed.parallel.megatron import MegatronGrid

        return MegatronGrid(engine)
    if tensor_parallel_size(engine) == 1 and int(engine.mp_world_size) == 1:
        return ParallelGrid(engine)
    return AutoTpGrid(engine)
