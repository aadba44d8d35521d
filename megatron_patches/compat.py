"""Names of megatron.core that this package uses, with their files, and the tested releases.

To support a new megatron-core, compare the files named here with the previous release, run the tests and extend
`TESTED`. `attach` and `apply` call `check_version` and `check_modules`, `attach` also calls `check_optimizer`, and
`cpu_megatron` calls `check_emulation`. Only these functions import megatron.core.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from mols_ds.errors import MolsUnsupportedError

TESTED = ((0, 15), (0, 19))
"""First and last megatron-core release (major, minor). tests/engines/megatron/test_versions.py ran with 0.15.3, 0.16.1,
0.17.1, 0.18.0 and 0.19.2; CI runs 0.16 and the last."""


TransformerConfig = Any
"""megatron.core.transformer.TransformerConfig. Its fields differ between releases: read them with a default."""


class Wrapper(Protocol):
    """A chained optimizer (optimizer/optimizer.py): a torch optimizer with fp32 copies or shards."""

    config: Any  # OptimizerConfig
    optimizer: Any  # the inner torch optimizer; None where this rank has no parameters


# ------------------------------------------------------------------ modules

ATTACHED: dict[str, tuple[str, ...]] = {
    "megatron.core.dist_checkpointing.mapping": ("ShardedObject",),
    "megatron.core.dist_checkpointing.serialization": ("load_sharded_metadata",),
    "megatron.core.num_microbatches_calculator": (
        *("_GLOBAL_NUM_MICROBATCHES_CALCULATOR", "get_current_global_batch_size", "ConstantNumMicroBatchesCalculator"),
    ),
    "megatron.core.optimizer": ("Adam",),
    "megatron.core.parallel_state": (
        "model_parallel_is_initialized",
        *(
            f"get_{kind}_parallel_{number}"
            for kind in ("tensor_model", "pipeline_model", "data", "expert_model", "expert_tensor", "expert_data")
            for number in ("world_size", "rank")
        ),
    ),
    "megatron.core.tensor_parallel": ("get_cuda_rng_tracker",),
}
"""Module -> names that an attached MoLS uses."""
UNDER_DEEPSPEED: dict[str, tuple[str, ...]] = {
    "megatron.core.parallel_state": (
        *ATTACHED["megatron.core.parallel_state"],
        *("get_context_parallel_world_size", "get_tensor_model_parallel_src_rank"),
        *("get_tensor_model_parallel_group", "get_pipeline_model_parallel_group", "get_data_parallel_group"),
    ),
    "megatron.core.tensor_parallel": ("get_cuda_rng_tracker",),
}
"""Module -> names that a Megatron-core model in a DeepSpeed engine needs."""
APPLIED: dict[str, tuple[str, ...]] = {
    "megatron.core.dist_checkpointing": ("load",),
    "megatron.core.optimizer": ("_get_param_groups",),
    "megatron.core.optimizer.optimizer": ("ChainedOptimizer",),
    "megatron.core.optimizer_param_scheduler": ("OptimizerParamScheduler",),
}
"""Module -> names that `megatron_patches.apply` replaces, or whose methods it replaces."""
EMULATED: dict[str, tuple[str, ...]] = {
    "megatron.core.tensor_parallel.random": ("_get_cuda_rng_state", "_set_cuda_rng_state"),
    "megatron.core.transformer.torch_norm": ("WrappedTorchNorm",),
    "megatron.core.transformer.dot_product_attention": ("DotProductAttention",),
    "megatron.core.transformer.multi_latent_attention": (),
    "megatron.core.transformer.moe.token_dispatcher": (),
    "megatron.core.transformer.moe.moe_utils": (),
}
"""Module -> names that `cpu_megatron` replaces. cpu/specs.py checks for names that only some releases have."""
EMULATED_ADAM: dict[str, tuple[str, ...]] = {
    "megatron.core.optimizer": ("Adam", "USING_PYTORCH_OPTIMIZER"),
    "megatron.core.optimizer.distrib_optimizer": ("Adam", "HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER"),
}
"""The same for `cpu_megatron(fused_adam=True)`."""
LANGUAGE_MODEL: dict[str, tuple[str, ...]] = {
    "megatron.core.datasets.utils": ("compile_helpers",),
    "megatron.legacy.fused_kernels": ("load",),
    "megatron.training.training": ("initialize_megatron",),
}
"""The same for `python -m megatron_patches.cpu`. The last two are in Megatron-LM (core_v0.16.1), not in
megatron-core."""
TRITON = (
    "megatron.core.transformer.moe.paged_stash",
    "megatron.core.transformer.moe.ops.paged_stash",
    "megatron.core.transformer.custom_layers.batch_invariant_kernels",
)
"""Modules that import triton. The pipeline schedules import the first (0.18) or the second (from 0.19), Megatron-LM's
initialize.py imports the third."""
GROUPED_GEMM = "megatron.core.transformer.moe.grouped_gemm_util"
"""Up to 0.16."""

TRACKERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("megatron.core.transformer.moe.moe_utils", ("_MOE_LAYER_WISE_LOGGING_TRACKER",)),  # up to 0.18
    ("megatron.core.transformer.moe.moe_logging", ("_MOE_METRICS_TRACKER", "_metrics")),
    ("megatron.core.transformer.multi_token_prediction", ("MTPLossLoggingHelper", "tracker")),
)
"""(module, attribute path of a dict of sums for logging), where the release has it."""

MODULE_ATTRIBUTES = ("current_microbatch",)
"""Attributes of modules that the schedules set before each pass (pipeline_parallel/schedules.py)."""

# ------------------------------------------------------------------ objects

CHAINED = ("prepare_grads", "step_with_ready_grads", "get_grad_norm", "sharded_state_dict", "load_state_dict", "step")
"""Attributes of `ChainedOptimizer` (optimizer/optimizer.py), besides `chained_optimizers`."""
WRAPPERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "DistributedOptimizer": (
        "optimizer/distrib_optimizer.py",
        (
            "optimizer",
            "model_param_gbuf_map",
            "_get_model_param_range_map",
            "model_param_group_index_map",
            "ddp_config",
        ),
    ),
    "Float16OptimizerWithFloat16Params": (
        "optimizer/optimizer.py",
        ("optimizer", "float16_groups", "fp32_from_float16_groups", "fp32_from_fp32_groups"),
    ),
    "FP32Optimizer": ("optimizer/optimizer.py", ("optimizer",)),
}
"""Class of a chained optimizer -> (its file, attributes that MoLS reads)."""
FLAGS: dict[str, tuple[str, ...]] = {
    "optimizer/optimizer.py": ("is_stub_optimizer", "decoupled_grad", "main_grad", "grad_scaler"),
    "optimizer/distrib_optimizer.py": ("distributed_optimizer_instance_id",),
    "optimizer_param_scheduler.py": ("lr_decay_steps", "lr_warmup_steps"),
    "tensor_parallel/layers.py": ("allreduce", "partition_dim", "tensor_model_parallel"),
    "transformer/transformer_layer.py": ("layer_number",),
    "extensions/transformer_engine.py": ("parallel_mode",),
    "models/common/language_module/language_module.py": ("shared", "shared_embedding"),
}
"""File -> attributes of optimizers, parameters and modules that MoLS reads with a default."""


# ------------------------------------------------------------------ checks


def check_version(force: bool) -> None:
    """Check the release of megatron-core.

    Args:
        force: accept an untested one.

    Raises:
        MolsUnsupportedError: it is missing or untested.
    """
    version = _installed()
    number = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if force or TESTED[0] <= number <= TESTED[1]:
        return
    raise MolsUnsupportedError(
        f"megatron-core {version} has not been tested with MoLS (tested: {tested()}): install one, or pass "
        "force=True and compare a short run with MoLS off"
    )


def tested() -> str:
    """Return the tested releases, such as "0.15 to 0.19"."""
    return " to ".join(".".join(map(str, bound)) for bound in TESTED)


def check_modules(table: Mapping[str, tuple[str, ...]]) -> None:
    """Check that megatron.core has what MoLS uses.

    Args:
        table: module -> names in it.

    Raises:
        MolsUnsupportedError: the first module or name that is missing.
    """
    for name, names in table.items():
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise  # a dependency of megatron.core
            raise _refusal(f"there is no module {error.name}") from None
        _require(name, found, names)


def check_optimizer(optimizer: object) -> None:
    """Raise `MolsUnsupportedError` where a ChainedOptimizer or a member lacks an attribute that MoLS uses."""
    _require(type(optimizer).__name__, optimizer, CHAINED)
    for wrapper in getattr(optimizer, "chained_optimizers", ()):
        kind = type(wrapper).__name__
        if kind in WRAPPERS and not getattr(wrapper, "is_stub_optimizer", False):
            file, names = WRAPPERS[kind]
            _require(f"{kind} ({file})", wrapper, names)


def optimizer_classes() -> tuple[type[Any], type[Any]]:
    """Return (ChainedOptimizer, OptimizerParamScheduler)."""
    chained: type[Any] = importlib.import_module("megatron.core.optimizer.optimizer").ChainedOptimizer
    scheduler: type[Any] = importlib.import_module("megatron.core.optimizer_param_scheduler").OptimizerParamScheduler
    return chained, scheduler


def _require(where: str, owner: object, names: Iterable[str]) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise _refusal(f"{where} has no {', '.join(missing)}")


def _installed() -> str:
    try:
        return str(importlib.import_module("megatron.core").__version__)
    except ImportError as error:
        raise MolsUnsupportedError(f"megatron-core cannot be imported ({error}): pip install megatron-core") from None


def _refusal(what: str) -> MolsUnsupportedError:
    return MolsUnsupportedError(
        f"MoLS does not support megatron-core {_installed()}: {what}; install a tested one ({tested()}), or report "
        "this version"
    )
