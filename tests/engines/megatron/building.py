"""Small real Megatron models on any grid of ranks, and a loop that trains them.

One logical model: a weight depends on its logical name alone, a micro-batch on its iteration and number alone. So each
grid holds and learns the same, and may be compared with another grid or with an oracle in one process.

`start`, `build`, `optimizer` and `step` are called inside `cpu_megatron()`, in this order, on every rank; several
setups can follow each other in one launch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.engines.megatron.model_config import DTYPES, transformer_config
from tests.engines.megatron.weights import fill
from tests.helpers.harness import draw_nothing

draw_nothing()

SEQUENCES = 2  # sequences of a micro-batch
POSITIONS = {"rope": "rope", "learned": "learned_absolute", "none": "none"}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Grid, model and optimizer of a test; hashable, so that it can be a case of `run_cases`.

    `micro_batches` are those of the whole batch, dealt over the data-parallel ranks. `recompute`: "full", or modules of
    selective recomputation joined by "+". Tensor parallelism with experts needs `sp`; `grouped` ends with 0.16.
    """

    tp: int = 1
    pp: int = 1
    vp: int = 0
    ep: int = 1
    etp: int | None = None
    sp: bool = False
    distributed: bool = True
    instances: int = 1
    tied: bool = False
    experts: int = 0
    grouped: bool = False
    shared_expert: bool = False
    balancing: bool = False  # biases of experts that move once an iteration, and two balancing losses
    dispatcher: str = "alltoall"  # of gloo, tp and ep together need "allgather" or etp=1: token counts differ by rank
    mla: bool = False
    q_lora: bool = False
    gate: bool = False
    mtp: int = 0
    qk_norm: bool = False
    bias: bool = False  # also LayerNorm instead of RMSNorm
    kv_groups: int = 2
    heads: int = 4
    layers: int = 2
    dtype: str = "float32"
    overlap: bool = False
    recompute: str = ""
    position: str = "rope"
    clip: float = 1.0
    lr: float = 1e-3
    weight_decay: float = 0.1
    micro_batches: int = 4
    vocab: int = 64
    hidden: int = 32
    seq: int = 16

    @property
    def n_layers(self) -> int:
        """`layers`, or as many as there are pipeline stages where they cannot be dealt evenly."""
        stages = self.pp * max(1, self.vp)
        return stages if self.layers % stages else self.layers


@dataclass(frozen=True)
class Built:
    """Model chunks of this rank, wrapped in Megatron's DistributedDataParallel, and what they were built from."""

    setup: Setup
    chunks: list[Any]
    config: Any  # TransformerConfig
    dtype: torch.dtype


@dataclass(frozen=True)
class Stepped:
    """What one iteration gave. `losses`: of this rank's micro-batches, on the last pipeline stage; empty elsewhere."""

    successful: bool
    grad_norm: float | None
    losses: list[float]


def newest() -> Path | None:
    """Folder with the newest megatron-core, to go in front of PYTHONPATH; None where `make setup-dev` put none."""
    folder = Path(os.environ.get("MOLS_MEGATRON_NEWEST") or Path(sys.prefix) / "megatron-core-newest")
    return folder if (folder / "megatron" / "core").is_dir() else None


# --- the grid -------------------------------------------------------------------------------------------------------


def start(setup: Setup) -> None:
    """Create the process groups of `setup` on the existing ranks, replacing the previous grid."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    stop()
    more = {"num_distributed_optimizer_instances": setup.instances} if setup.instances > 1 else {}
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=setup.tp,
        pipeline_model_parallel_size=setup.pp,
        virtual_pipeline_model_parallel_size=setup.vp or None,
        expert_model_parallel_size=setup.ep,
        expert_tensor_parallel_size=setup.etp,
        **more,
    )
    model_parallel_cuda_manual_seed(1)


def stop() -> None:
    """Forget the grid, its process groups and what Megatron keeps in module variables."""
    from megatron.core import parallel_state
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()
    if not parallel_state.model_parallel_is_initialized():
        return
    groups = [group for group in parallel_state._global_process_group_list or () if group is not None]
    dist.barrier()
    parallel_state.destroy_model_parallel()
    for group in groups:  # Megatron forgets most of its groups without ending them: their threads would pile up
        if group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


# --- the model ------------------------------------------------------------------------------------------------------


def build(setup: Setup, prepare: Callable[[Any], object] = lambda model: None) -> Built:
    """Build this rank's part of the model of `setup` with its weights; `start(setup)` has been called.

    prepare: called with each chunk before Megatron's DistributedDataParallel wraps it.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.transformer.module import Float16Module

    dtype, config = DTYPES[setup.dtype], transformer_config(setup)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=setup.distributed,
        overlap_grad_reduce=setup.overlap,
        grad_reduce_in_fp32=True,
        bucket_size=4000,  # several buckets in a model of this size
        num_distributed_optimizer_instances=setup.instances,
    )
    rank, chunks = parallel_state.get_pipeline_model_parallel_rank(), []
    for stage in range(max(1, setup.vp)):
        model = stage_model(
            setup, config, rank == 0 and stage == 0, rank == setup.pp - 1 and stage == max(1, setup.vp) - 1
        )(**({"vp_stage": stage} if setup.vp else {}))
        if dtype is not torch.float32:
            model = Float16Module(config, model)
        prepare(model)
        chunks.append(DistributedDataParallel(config, ddp_config, model, disable_bucketing=stage > 0))
    config.finalize_model_grads_func = finalize_model_grads
    if setup.overlap:
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    fill(chunks, setup)
    return Built(setup, chunks, config, dtype)


def stage_model(setup: Setup, config: Any, first: bool, last: bool) -> Any:
    """Return `build(**more)` of a GPTModel for a pipeline stage."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec

    spec = get_gpt_layer_local_spec(
        num_experts=setup.experts or None,
        moe_grouped_gemm=setup.grouped,
        qk_layernorm=setup.qk_norm,
        multi_latent_attention=setup.mla,
        normalization=config.normalization,
    )

    def model(**stage: Any) -> Any:
        mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, **stage) if setup.mtp else None
        return GPTModel(
            config,
            spec,
            vocab_size=setup.vocab,
            max_sequence_length=setup.seq,
            pre_process=first,
            post_process=last,
            position_embedding_type=POSITIONS[setup.position],
            share_embeddings_and_output_weights=setup.tied,
            mtp_block_spec=mtp,
            **stage,
        )

    return model


# --- optimizer and loop ---------------------------------------------------------------------------------------------


def optimizer(
    built: Built,
    *,
    iterations: int = 20,
    warmup: int = 4,
    init_lr: float = 0.0,
    style: str = "cosine",
    decay: Mapping[str, Any] | None = None,
    groups: Callable[[Any], Any] = lambda config: None,
    **overrides: Any,
) -> tuple[Any, Any]:
    """Return (optimizer, OptimizerParamScheduler): Adam, linear warm-up, then a decay.

    Args:
        built: the model.
        iterations: updates of the decay.
        warmup: updates of the warm-up.
        init_lr: the rate that the warm-up begins at.
        style: the scheduler's `lr_decay_style`.
        decay: what that style needs beside it.
        groups: OptimizerConfig -> `config_overrides`, rates and decays of some parameters' own.
        overrides: of OptimizerConfig.
    """
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    setup = built.setup
    settings = dict(
        optimizer="adam",
        lr=setup.lr,
        min_lr=setup.lr / 10,
        adam_beta2=0.95,
        weight_decay=setup.weight_decay,
        clip_grad=setup.clip,
        use_distributed_optimizer=setup.distributed,
        params_dtype=built.dtype,
        bf16=built.dtype is torch.bfloat16,
        fp16=built.dtype is torch.float16,
        initial_loss_scale=2.0**10,
        min_loss_scale=1.0,
    )
    config = OptimizerConfig(**{**settings, **overrides})
    result = get_megatron_optimizer(config, built.chunks, config_overrides=groups(config))
    result.reload_model_params()  # the weights were set behind the masters' back
    built.config.grad_scale_func = result.scale_loss
    scheduler = OptimizerParamScheduler(
        result,
        init_lr=init_lr,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup * samples_per_step(setup),
        lr_decay_steps=iterations * samples_per_step(setup),
        lr_decay_style=style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=iterations * samples_per_step(setup),
        wd_incr_style="constant",
        **(decay or {}),
    )
    return result, scheduler


def attach(built: Built, optimizer: Any, scheduler: Any, section: Mapping[str, Any]) -> Any:
    """`megatron_patches.attach`."""
    import megatron_patches

    return megatron_patches.attach(
        built.chunks, optimizer, scheduler, section, samples_per_step=samples_per_step(built.setup)
    )


def samples_per_step(setup: Setup) -> int:
    """Sequences of one global batch: what Megatron's scheduler counts."""
    return setup.micro_batches * SEQUENCES


def tokens(setup: Setup, iteration: int, micro_batch: int) -> Tensor:
    """Int64 [SEQUENCES, seq] of a micro-batch of the whole batch; labels are these, rolled by one to the left.

    Low ids are frequent and high ones rare: gradients have a signal, and some rows of the embedding do not move.
    """
    generator = torch.Generator().manual_seed(10_000 * iteration + micro_batch + 1)
    return (torch.rand(SEQUENCES, setup.seq, generator=generator) ** 4 * setup.vocab).long()


def _mine(setup: Setup, iteration: int) -> Iterator[Tensor]:
    """This data-parallel rank's micro-batches, as if cards were dealt."""
    from megatron.core import parallel_state

    rank, world = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    assert setup.micro_batches % world == 0, f"{setup.micro_batches} micro-batches over {world} data-parallel ranks"
    for number in range(rank, setup.micro_batches, world):
        yield tokens(setup, iteration, number)


def forward_backward(built: Built, iteration: int) -> list[float]:
    """Gradients of one global batch, reduced. Returns this rank's losses, as `Stepped`."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    setup = built.setup
    positions = torch.arange(setup.seq)[None].expand(SEQUENCES, -1)
    masked = torch.triu(torch.ones(1, 1, setup.seq, setup.seq, dtype=torch.bool), 1)

    def loss_of(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = output.float().mean()
        return loss, {"loss": loss.detach().clone()}  # the schedule divides `loss` in place

    def forward_step(iterator: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
        ids = next(iterator)
        more = {"loss_mask": torch.ones(ids.shape)} if setup.mtp else {}
        return model(ids, positions, masked, labels=ids.roll(-1, 1), **more), loss_of

    iterators = [_mine(setup, iteration) for _ in built.chunks]
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=built.chunks,
        num_microbatches=setup.micro_batches // parallel_state.get_data_parallel_world_size(),
        seq_length=setup.seq,
        micro_batch_size=SEQUENCES,
        forward_only=False,
    )
    return [float(result["loss"]) for result in results or ()]


def step(built: Built, optimizer: Any, scheduler: Any, iteration: int) -> Stepped:
    """One iteration, as Megatron-LM's `train_step`: the scheduler does not advance if the optimizer skipped."""
    for chunk in built.chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    losses = forward_backward(built, iteration)
    successful, grad_norm, _ = optimizer.step()
    if successful and scheduler is not None:
        scheduler.step(increment=samples_per_step(built.setup))
    return Stepped(bool(successful), None if grad_norm is None else float(grad_norm), losses)


def mean_loss(stepped: Stepped) -> float:
    """Mean loss of the whole batch, on every rank (a collective call)."""
    sums = torch.tensor([sum(stepped.losses), len(stepped.losses)], dtype=torch.float64)
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])
