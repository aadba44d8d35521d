"""Build Megatron-core's config objects from the settings. Uses no process group: everything can be checked at once.

Sources: `megatron/training/arguments.py` of Megatron-LM (`core_transformer_config_from_args`, and checks between
arguments that Megatron-core lacks).
"""

from __future__ import annotations

import dataclasses
import math
import typing
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from megatron_patches.machine import Machine, probe_machine
from megatron_patches.precision import check
from mols_ds.core.validation import suggestion, validation_message
from mols_ds.errors import MolsConfigError
from mols_ds.training.megatron_settings import Settings
from mols_ds.training.sources import one_line

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ELSEWHERE = {
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "virtual_pipeline_model_parallel_size": "parallel.vp",
    "expert_model_parallel_size": "parallel.ep",
    "expert_tensor_parallel_size": "parallel.etp",
    "context_parallel_size": "parallel.cp",
    "sequence_parallel": "parallel.sp",
    "params_dtype": "precision.dtype",
    "pipeline_dtype": "precision.dtype",
    "autocast_dtype": "precision.dtype",
    "bf16": "precision.dtype",
    "fp16": "precision.dtype",
    "gated_linear_unit": "model.activation",
    "activation_func": "model.activation",
} | {
    key: f"precision.{key}"
    for key in ("fp8", "fp8_recipe", "fp8_param", "fp4", "fp4_param", "gradient_accumulation_fusion")
}
"""Fields of TransformerConfig that another config key sets."""


@dataclass(frozen=True)
class GridSizes:
    """Layout of `world` ranks."""

    world: int
    data: int

    @classmethod
    def of(cls, settings: Settings, world: int) -> GridSizes:
        """Return the grid of `world` ranks. Raises MolsConfigError if they do not divide."""
        parallel = settings.parallel
        model = parallel.tp * parallel.pp * parallel.cp
        if world % model:
            raise MolsConfigError(
                f"parallel: tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} needs a multiple of {model} ranks, "
                f"not {world} (torchrun --nproc_per_node)"
            )
        experts = parallel.ep * (parallel.etp or parallel.tp) * parallel.pp
        if world % experts:
            raise MolsConfigError(
                f"parallel: ep {parallel.ep} x etp {parallel.etp or parallel.tp} x pp {parallel.pp} needs a multiple "
                f"of {experts} ranks, not {world}"
            )
        return cls(world, world // model)


def micro_batches(settings: Settings, grid: GridSizes) -> int:
    """Return the forward passes of a rank per step. Raises MolsConfigError if the batch does not divide."""
    batch, parallel = settings.batch, settings.parallel
    share = batch.micro * grid.data
    if batch.total % share:
        raise MolsConfigError(
            f"batch: global {batch.total} is not a multiple of micro {batch.micro} x {grid.data} data-parallel ranks"
        )
    passes = batch.total // share
    if parallel.vp is not None and passes % parallel.pp:
        raise MolsConfigError(
            f"batch: {passes} micro-batches a step do not divide by pp {parallel.pp}, as vp needs; change batch.global"
        )
    return passes


def dtype_of(settings: Settings) -> torch.dtype:
    """Return the weights' dtype: bf16 for `auto` on a GPU that supports it and for FP8 or FP4, else fp32."""
    precision = settings.precision
    if precision.dtype != "auto":
        return DTYPES[precision.dtype]
    native = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if native or precision.fp8 or precision.fp4 else torch.float32


def uses_engine(settings: Settings, machine: Machine) -> bool:
    """Whether to use Transformer Engine's layers. Raises MolsConfigError if they are required and missing."""
    wanted = settings.precision.transformer_engine
    ready = machine.engine is not None and machine.capability is not None
    if wanted is True and not ready:
        why = machine.engine_missing or "this process has no CUDA device"
        raise MolsConfigError(f"precision.transformer_engine: true, but {why}; use auto or false")
    if settings.parallel.cp > 1 and (wanted is False or not ready):
        raise MolsConfigError("parallel.cp: context parallelism needs Transformer Engine's attention; use cp: 1")
    return ready and wanted is not False


def _activation(name: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], bool]:
    """Return (function, whether it is gated)."""
    if name == "squared_relu":
        return _squared_relu, False
    gated = name in ("swiglu", "geglu")
    return (torch.nn.functional.silu if name == "swiglu" else torch.nn.functional.gelu), gated


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.relu(x).square()


def _further(settings: Settings, kind: type[TransformerConfig]) -> dict[str, object]:
    """Return the `model` keys that are fields of TransformerConfig, checked by name and type."""
    own = type(settings.model).model_fields
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    hints = typing.get_type_hints(kind)
    out = {}
    for key, value in settings.model.further.items():
        if key in ELSEWHERE:
            raise MolsConfigError(f'"model.{key}": is set by "{ELSEWHERE[key]}"')
        if key not in fields:
            known = sorted({*own, *fields} - set(ELSEWHERE))
            hint = suggestion(key, known)
            raise MolsConfigError(
                f'"model.{key}": unknown key'
                + (
                    f"; {hint}"
                    if hint.startswith("did")
                    else "; neither a key of this section nor of TransformerConfig"
                )
            )
        try:
            adapter = TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True))
            out[key] = adapter.validate_python(value)
        except PydanticUserError:
            out[key] = value  # a type of Megatron's, which its config checks
        except ValidationError as error:
            raise MolsConfigError(validation_message(error, hints[key], f"model.{key}")) from None
    return out


def transformer_config(settings: Settings, machine: Machine | None = None) -> TransformerConfig:
    """Return Megatron-core's TransformerConfig (MLATransformerConfig with `multi_latent_attention`).

    Raises:
        MolsConfigError: an unknown `model` key, or a value that Megatron refuses; one line.
        MolsUnsupportedError: a precision that this machine lacks (see `megatron_patches.precision.check`).
    """
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    machine = probe_machine() if machine is None else machine
    model, parallel, precision = settings.model, settings.parallel, settings.precision
    kind = MLATransformerConfig if model.further.get("multi_latent_attention") else TransformerConfig
    dtype = dtype_of(settings)
    low = bool(precision.fp8 or precision.fp4)
    if low:  # before Megatron's checks, some of which fail with no name without Transformer Engine
        check(SimpleNamespace(fp8=precision.fp8, fp8_recipe=precision.fp8_recipe, fp4=precision.fp4), machine=machine)
    engine = low or uses_engine(settings, machine)
    function, gated = _activation(model.activation)
    values: dict[str, object] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_query_groups": model.num_query_groups,
        "normalization": model.normalization,
        "activation_func": function,
        "gated_linear_unit": gated,
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vp,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": parallel.etp,
        "context_parallel_size": parallel.cp,
        "sequence_parallel": parallel.sp,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "fp8": precision.fp8,
        "fp8_recipe": precision.fp8_recipe,
        "fp8_param": precision.fp8_param,
        "fp4": precision.fp4,
        "fp4_param": precision.fp4_param,
        "gradient_accumulation_fusion": precision.gradient_accumulation_fusion,
        # LLaMA's choices; keys of the file override them
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": not torch.cuda.is_available(),
        # The local modules' fused kernels need CUDA or a build; Transformer Engine has its own
        "masked_softmax_fusion": False,
        "bias_activation_fusion": engine and model.activation == "swiglu",  # others only in some combinations
        "bias_dropout_fusion": engine,
        "attention_softmax_in_fp32": True,
    }
    if parallel.vp is not None:
        # With both at their defaults the stages' messages mix up without an error (arguments.py forbids it)
        values |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    values |= _further(settings, kind)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = kind(**values)
    except (ValueError, AssertionError, TypeError, RuntimeError, ImportError, NotImplementedError) as error:
        raise MolsConfigError(f"model: Megatron-core refuses it: {one_line(error)}") from error
    _check_shapes(settings, config)
    check(config, machine=machine)
    return config


def _check_shapes(settings: Settings, config: TransformerConfig) -> None:
    """Check sizes that Megatron checks only while it builds, or divides silently."""
    parallel = settings.parallel
    heads = config.num_attention_heads
    if config.hidden_size % heads and "kv_channels" not in settings.model.further:
        raise MolsConfigError(f"model.num_attention_heads: hidden_size {config.hidden_size} does not divide by {heads}")
    if heads % parallel.tp:
        raise MolsConfigError(f"model.num_attention_heads: {heads} does not divide by parallel.tp {parallel.tp}")
    if config.num_query_groups is not None and heads % config.num_query_groups:
        raise MolsConfigError(f"model.num_query_groups: {config.num_query_groups} does not divide {heads} heads")
    stages = parallel.pp * (parallel.vp or 1)
    uneven = (
        "pipeline_model_parallel_layout",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
    )
    placed = any(getattr(config, name, None) for name in uneven) or any(
        getattr(config, f"account_for_{part}_in_pipeline_split", False) for part in ("embedding", "loss")
    )
    if config.num_layers % stages and not placed:
        raise MolsConfigError(f"model.num_layers: {config.num_layers} does not divide among {stages} pipeline stages")
    length = settings.model.max_sequence_length
    if length is not None and settings.run.seq_len > length:
        raise MolsConfigError(f"run.seq_len: {settings.run.seq_len} is above model.max_sequence_length {length}")
    parts = parallel.tp * parallel.cp if parallel.sp else parallel.cp
    if settings.run.seq_len % parts:
        raise MolsConfigError(f"run.seq_len: {settings.run.seq_len} does not divide by {parts} (tp x cp under sp)")
    if parallel.ep > 1 and not config.num_moe_experts:
        raise MolsConfigError("parallel.ep: the model has no experts; set model.num_moe_experts or ep: 1")


def optimizer_config(settings: Settings) -> OptimizerConfig:
    """Return Megatron-core's OptimizerConfig. Raises MolsConfigError if Megatron refuses it."""
    from megatron.core.optimizer import OptimizerConfig

    chosen, dtype = settings.optimizer, dtype_of(settings)
    values: dict[str, object] = {
        "optimizer": chosen.name,
        "lr": chosen.lr,
        "min_lr": chosen.lr * settings.scheduler.min_lr_share,
        "weight_decay": chosen.weight_decay,
        "adam_beta1": chosen.betas[0],
        "adam_beta2": chosen.betas[1],
        "adam_eps": chosen.eps,
        "sgd_momentum": chosen.momentum,
        "clip_grad": chosen.clip_grad,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": dtype,
        "use_distributed_optimizer": settings.parallel.distributed_optimizer,
        "overlap_param_gather": settings.parallel.overlap_param_gather,
        "use_precision_aware_optimizer": chosen.precision_aware,
        "fp8_recipe": settings.precision.fp8_recipe if settings.precision.fp8 else None,
    }
    try:
        return OptimizerConfig(**values)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise MolsConfigError(f"optimizer: Megatron-core refuses it: {one_line(error)}") from error


def ddp_config(settings: Settings) -> DistributedDataParallelConfig:
    """Megatron-core's DistributedDataParallelConfig."""
    from megatron.core.distributed import DistributedDataParallelConfig

    parallel, precision = settings.parallel, settings.precision
    return DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.distributed_optimizer,
        num_distributed_optimizer_instances=parallel.distributed_optimizer_instances,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        grad_reduce_in_fp32=precision.grad_reduce_in_fp32,
        fp8_param_gather=precision.fp8_param,
    )


def padded_vocabulary(size: int, settings: Settings) -> int:
    """Return the rows of the embedding: `size` rounded up to a multiple of vocab_multiple x tp."""
    multiple = settings.model.vocab_multiple * settings.parallel.tp
    return math.ceil(size / multiple) * multiple
