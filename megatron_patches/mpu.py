"""Megatron-core's process groups with the interface of DeepSpeed's `mpu`.

DeepSpeed's engine expects the "model parallel unit" of the first Megatron-LM. `megatron.core.parallel_state` lacks some
of its functions, and others have different arguments. "Model parallel" means all ranks of one copy of the model: the
tensor-parallel ranks, because DeepSpeed does not run Megatron's pipeline schedules.
"""

from __future__ import annotations

from megatron.core import parallel_state
from torch import distributed as dist

from mols_ds.errors import MolsUnsupportedError


class DeepSpeedMpu:
    """Pass `mpu=DeepSpeedMpu()` to `mols_ds.initialize` (or `deepspeed.initialize`) with a Megatron-core model.

    Create it after `parallel_state.initialize_model_parallel(...)`.

    Raises:
        MolsUnsupportedError: no process groups yet; or pipeline, context or expert parallelism, which DeepSpeed cannot
            run with Megatron's modules.
    """

    def __init__(self) -> None:
        if not parallel_state.model_parallel_is_initialized():
            raise MolsUnsupportedError(
                "megatron.core.parallel_state is not initialised: call "
                "parallel_state.initialize_model_parallel(tensor_model_parallel_size) before DeepSpeedMpu()"
            )
        for kind, size in (
            ("pipeline_model_parallel_size", parallel_state.get_pipeline_model_parallel_world_size()),
            ("context_parallel_size", parallel_state.get_context_parallel_world_size()),
            ("expert_model_parallel_size", parallel_state.get_expert_model_parallel_world_size()),
        ):
            if size > 1:
                raise MolsUnsupportedError(
                    f"DeepSpeed cannot run a Megatron model with {kind} {size}: use 1, or train with Megatron's own "
                    "optimizer and megatron_patches.attach"
                )

    # all ranks of one copy of the model
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)

    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)

    # one stage
    get_pipeline_model_parallel_rank = staticmethod(lambda: 0)
    get_pipeline_model_parallel_world_size = staticmethod(lambda: 1)
    get_pipeline_model_parallel_group = staticmethod(parallel_state.get_pipeline_model_parallel_group)

    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(dist.get_process_group_ranks(self.get_data_parallel_group()))
