"""Build process groups, model, optimizer and scheduler as Megatron-LM's `setup_model_and_optimizer` does."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist

from mols_ds.errors import MolsConfigError
from mols_ds.training.kernel_caches import check_kernel_caches
from mols_ds.training.megatron_config import GridSizes, ddp_config, optimizer_config, padded_vocabulary
from mols_ds.training.megatron_settings import Settings
from mols_ds.training.rank_env import be_single_rank, port_taken

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer.transformer_config import TransformerConfig

STAGE_SEED = 100
"""Seed offset per pipeline stage, so that stages start with different weights (megatron/training/initialize.py)."""


@dataclass(frozen=True)
class Built:
    """Everything to train. `chunks`: this rank's model chunks, wrapped in DistributedDataParallel."""

    chunks: list[DistributedDataParallel]
    config: TransformerConfig
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def start_ranks(timeout: float | None = None) -> tuple[int, int]:
    """Join the ranks that torchrun started; a plain `python train_megatron.py` is one rank.

    Args:
        timeout: seconds after which a collective fails that a rank does not join; None: torch's default.

    Returns:
        (rank, world size).
    """
    be_single_rank()
    check_kernel_caches()
    if not dist.is_initialized():
        patience = None if timeout is None else timedelta(seconds=timeout)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            with port_taken():
                dist.init_process_group("nccl", timeout=patience)
        else:
            if "OMP_NUM_THREADS" not in os.environ:
                local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
            with port_taken():
                dist.init_process_group("gloo", timeout=patience)
    return dist.get_rank(), dist.get_world_size()


def grid_sizes(settings: Settings) -> dict[str, int | None]:
    """Sizes of the grid as arguments of Megatron's `initialize_model_parallel`."""
    parallel = settings.parallel
    return {
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vp,
        "context_parallel_size": parallel.cp,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": parallel.etp,
    }


def start_grid(settings: Settings, grid: GridSizes, timeout: float | None = None) -> None:
    """Create the process groups of the grid, once per process. `timeout`: as in `start_ranks`.

    Raises:
        MolsConfigError: Megatron refuses the grid.
    """
    from megatron.core import parallel_state

    parallel = settings.parallel
    if parallel_state.model_parallel_is_initialized():
        return
    more: dict[str, float] = {} if timeout is None else {"distributed_timeout_minutes": timeout / 60}
    if parallel.distributed_optimizer_instances > 1:
        more["num_distributed_optimizer_instances"] = parallel.distributed_optimizer_instances
    try:
        parallel_state.initialize_model_parallel(
            **grid_sizes(settings),
            **more,
        )
    except (RuntimeError, AssertionError, ValueError) as error:
        raise MolsConfigError(f"parallel: Megatron-core refuses it on {grid.world} ranks: {error}") from error


def seed_all(settings: Settings) -> None:
    """Seed weights and dropout, the same for both arms of a comparison."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    seed = settings.run.seed + STAGE_SEED * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def build(settings: Settings, config: TransformerConfig, *, vocab_size: int, engine: bool) -> Built:
    """Build model, optimizer and scheduler of an arm.

    Args:
        settings: the run's config.
        config: TransformerConfig; gets the functions that Megatron's schedules call.
        vocab_size: of the tokenizer, before padding.
        engine: use Transformer Engine's layers.
    """
    from megatron.core.optimizer import get_megatron_optimizer

    seed_all(settings)
    chunks = _chunks(settings, config, vocab_size, engine)
    optimizer = get_megatron_optimizer(optimizer_config(settings), chunks)
    _connect(config, chunks, optimizer, settings)
    return Built(chunks, config, optimizer, _scheduler(settings, optimizer))


def _chunks(
    settings: Settings, config: TransformerConfig, vocab_size: int, engine: bool
) -> list[DistributedDataParallel]:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.transformer.module import Float16Module

    layout, chunks = ddp_config(settings), []
    for stage in range(settings.parallel.vp or 1):
        model = _model(settings, config, vocab_size, engine, stage if settings.parallel.vp else None)
        if torch.cuda.is_available():
            model.cuda(torch.cuda.current_device())
        if config.bf16 or config.fp16:
            model = Float16Module(config, model)
        chunks.append(DistributedDataParallel(config, layout, model, disable_bucketing=stage > 0))
    for chunk in chunks:
        chunk.broadcast_params()
    return chunks


def _model(settings: Settings, config: TransformerConfig, vocab_size: int, engine: bool, stage: int | None) -> GPTModel:
    """Build the GPTModel of one pipeline stage of this rank."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec

    model = settings.model
    place = {} if stage is None else {"vp_stage": stage}
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=engine, normalization=model.normalization, **place
    )
    mtp = None
    if getattr(config, "mtp_num_layers", None):
        mtp = get_gpt_mtp_block_spec(config, block, use_transformer_engine=engine, **place)
    return GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=padded_vocabulary(vocab_size, settings),
        max_sequence_length=model.max_sequence_length or settings.run.seq_len,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=stage is None, **place),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=stage is None, **place),
        position_embedding_type=model.position_embedding,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        share_embeddings_and_output_weights=model.tied_embeddings,
        mtp_block_spec=mtp,
        **place,
    )


def _connect(
    config: TransformerConfig,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    settings: Settings,
) -> None:
    """Set the functions with which Megatron's schedules reach optimizer and data parallelism
    (megatron/training/training.py, `train`)."""
    from megatron.core.distributed import finalize_model_grads

    def one_or_all(functions: list[Callable[..., object]]) -> object:
        return functions[0] if len(functions) == 1 else functions

    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if settings.parallel.overlap_grad_reduce:
        config.no_sync_func = one_or_all([chunk.no_sync for chunk in chunks])
    if settings.parallel.overlap_param_gather:
        config.param_sync_func = one_or_all([chunk.start_param_sync for chunk in chunks])


def _scheduler(settings: Settings, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Build Megatron's scheduler, which counts sequences as in Megatron-LM.

    Warm-up starts at rate / warm-up steps: from 0, Megatron-LM's default, the first step would do nothing.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    chosen, plan, per = settings.optimizer, settings.scheduler, settings.batch.total
    steps = settings.run.steps
    warmup = min(max(1, round(plan.warmup * steps)), max(0, steps - 1)) if plan.warmup else 0
    return OptimizerParamScheduler(
        optimizer,
        init_lr=chosen.lr / warmup if warmup else chosen.lr,
        max_lr=chosen.lr,
        min_lr=chosen.lr * plan.min_lr_share,
        lr_warmup_steps=warmup * per,
        lr_decay_steps=steps * per,
        lr_decay_style=plan.style,
        start_wd=chosen.weight_decay,
        end_wd=chosen.weight_decay,
        wd_incr_steps=steps * per,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run uses this config
    )
