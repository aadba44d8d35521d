"""The tested version of DeepSpeed, and every name of it that is used beyond its documented interface.

To support a new DeepSpeed, compare the files named here with the previous release, run the tests, and set `TESTED`.

Every name is checked before use: `check` when MoLS attaches to an engine, `check_optimizer` when its optimizer is read,
`module` when a module is needed. Only these functions import DeepSpeed, so that the launcher and `mols-ds doctor` can
read the tables without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mols_ds.errors import MolsUnsupportedError

if TYPE_CHECKING:
    from torch import Tensor, nn

TESTED = "0.19.8"
Config = Mapping[str, Any]
"""A DeepSpeed config, or the arguments of `deepspeed.initialize` by name."""


INITIALIZE = (
    *("args", "model", "optimizer", "model_parameters", "training_data", "lr_scheduler", "distributed_port", "mpu"),
    *("dist_init_required", "collate_fn", "config", "mesh_param", "config_params"),
)
"""Arguments of `deepspeed.initialize` in order, for replacements that do not name them."""
LOAD_CHECKPOINT: Config = {
    "load_dir": None,
    "tag": None,
    "load_module_strict": True,
    "load_optimizer_states": True,
    "load_lr_scheduler_states": True,
    "load_module_only": False,
    "custom_load_fn": None,
}
"""The arguments of `engine.load_checkpoint` in order, with defaults, for replacements that do not name them."""


class DocumentedEngine(Protocol):
    """The engine's interface for clients of `deepspeed.initialize` (deepspeed.readthedocs.io), and `mols`."""

    mols: Any  # set by MoLS
    module: Any  # the model: nn.Module, or PipelineModule with its own names
    optimizer: Any  # one of OPTIMIZERS, or a torch optimizer at stage 0
    config: Any  # argument of `initialize`: a path or a mapping
    save_checkpoint: Callable[..., bool]
    load_checkpoint: Callable[..., tuple[str | None, Any]]
    zero_grad: Callable[[], None]


class Engine(DocumentedEngine, Protocol):
    """DeepSpeedEngine or PipelineEngine, with the names of runtime/engine.py that MoLS uses."""

    _take_model_step: Callable[..., None]
    _get_all_ckpt_names: Callable[..., list[str]]
    _zero3_consolidated_16bit_state_dict: Callable[..., dict[str, Any] | None]
    param_names: dict[nn.Parameter, str]
    global_rank: int
    global_steps: int
    micro_steps: int
    losses: object
    lr_scheduler: Any
    loaded_checkpoint_dp_world_size: int | None
    seq_data_parallel_group: Any
    mpu: Any
    mp_world_size: int
    pipeline_parallelism: bool
    autotp_size: Callable[[], int | None]
    gradient_accumulation_steps: Callable[[], int]
    managed_gradient_accumulation: Callable[[], bool]
    was_step_applied: Callable[[], bool]
    zero_optimization: Callable[[], bool]
    zero_optimization_stage: Callable[[], int]
    zero_compute_grad_norm: Callable[[], bool]
    zero_nvme_offload_optimizer: Callable[[], bool]
    load_universal_checkpoint: Callable[[], bool]
    monitor: Any
    training_dataloader: Any
    flops_profiler_enabled: Callable[[], bool]
    curriculum_learning_enabled: Callable[[], bool]


class PipelineEngine(Engine, Protocol):
    """The engine of a PipelineModule, with the names of runtime/pipe/engine.py that MoLS also uses."""

    grid: Any


ENGINE_NAMES = tuple(Engine.__annotations__)
ENGINE_FLAGS = ("has_moe_layers", "torch_autocast_z0_gradscaler", "zenflow", "is_deepcompile_enabled")
"""Names of runtime/engine.py that switch a feature on. Without the name the feature does not exist."""
GRID_NAMES = ("get_slice_parallel_world_size", "get_pipe_parallel_world_size", "get_pipe_parallel_group")
"""Names of `PipelineEngine.grid` (runtime/pipe/topology.py). `micro_offset` of PipelineModule (runtime/pipe/module.py)
is saved and restored too."""


class Names(NamedTuple):
    """Names that MoLS uses of one DeepSpeed class.

    Attributes:
        file: path below deepspeed/ of the class.
        names: attributes of its instances.
        parameters: (the instance's list of lists of parameters, attributes of those).
    """

    file: str
    names: tuple[str, ...] = ()
    parameters: tuple[str, tuple[str, ...]] | None = None


STAGE_1_AND_2 = (
    *("single_partition_of_fp32_groups", "bit16_groups", "params_in_partition", "partition_size"),
    *("grad_start_offset", "grad_partition_insertion_offset", "real_dp_process_group", "get_param_id"),
    *("averaged_gradients", "all_grad_tensors", "cpu_offload", "micro_step_id", "reset_cpu_buffers"),
    *("_release_preflattened_grad_buffers", "_wait_for_offload_copies", "loss_scale", "clip_grad"),
)
STAGE_3 = (
    *("fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat_numel", "fp16_groups", "grad_position"),
    *("get_param_id", "sub_group_to_group_id", "averaged_gradients", "offload_optimizer", "persistent_parameters"),
    *("reset_cpu_buffers", "_pre_step", "_partition_all_parameters", "_swappable_optimizer_subgroup"),
    *("_optimizer_states_and_gradient_swap_in", "_release_swap_buffers", "_writeback_swap_state", "loss_scale"),
    *("clip_grad", "grad_partitions_flat_buffer", "micro_step_id"),
)
OPTIMIZERS: dict[str, Names] = {
    "DeepSpeedZeroOptimizer": Names("runtime/zero/stage_1_and_2.py", STAGE_1_AND_2),
    "DeepSpeedZeroOptimizer_Stage3": Names(
        "runtime/zero/stage3.py", STAGE_3, ("fp16_groups", ("ds_shape", "ds_numel", "ds_process_group"))
    ),
    "BF16_Optimizer": Names(
        "runtime/bf16_optimizer.py",
        ("fp32_groups_flat_partition", "fp32_groups_gradient_flat_partition", "bf16_groups", "clip_grad"),
        ("bf16_groups", ("_hp_mapping",)),
    ),
    "FP16_UnfusedOptimizer": Names("runtime/fp16/unfused_optimizer.py", ("fp16_groups", "fp32_groups")),
    "FP16_Optimizer": Names("runtime/fp16/fused_optimizer.py", ("fp16_groups", "fp32_groups_flat")),
}
"""Class of `engine.optimizer` -> names that MoLS reads."""
OPTIMIZER_FLAGS = (
    *("backup_optimizer", "partial_offload", "swap_optimizer", "elastic_checkpoint", "round_robin_gradients"),
    *("_offload_accumulated_param_ids", "_global_grad_norm", "_epilogue_ran_this_backward", "norm_for_param_grads"),
    *("loss_scale_config", "loss_scaler", "_update_scale"),
)
"""Names of these classes that are read with a default, or that exist only with some settings."""

STATE, WHOLE, VERSION = "optimizer_state_dict", "param", "ds_version"
"""Keys in the files of universal checkpoints."""
AUTOTP = "ds_autotp_universal_checkpoint_meta"
"""Attribute of a parameter with AutoTP's note on how it was split."""
CONSTANTS = {"OPTIMIZER_STATE_DICT": STATE, "PARAM": WHOLE, "DS_VERSION": VERSION, "DS_AUTOTP_UC_META": AUTOTP}
"""Values of checkpoint/constants.py."""
PARAMETER_FLAGS = (
    "ds_tensor",
    "partition_numel",
    "tensor_model_parallel",
    "ds_pipe_replicated",
    "ds_shape",
    "_hp_mapping",
    AUTOTP,
)
"""Attributes that DeepSpeed sets on some parameters (module_inject/layers.py, runtime/pipe/module.py,
runtime/zero/partition_parameters.py, utils/tensor_fragment.py)."""

MODULE_ATTRIBUTES = ("ds_", "_ds_", "applied_pre_backward_ref_cnt", "micro_offset")
"""Name prefixes of DeepSpeed's own numbers in modules (runtime/zero/parameter_offload.py, runtime/pipe/module.py). A
probe window does not restore them."""

ATTACHED: dict[str, tuple[str, ...]] = {
    "deepspeed.checkpoint.constants": tuple(CONSTANTS),
    "deepspeed.runtime.activation_checkpointing.checkpointing": ("get_cuda_rng_tracker",),
    "deepspeed.runtime.zero.utils": ("ZeRORuntimeException",),
    "deepspeed.utils.bwc": ("bwc_tensor_model_parallel_rank", "bwc_tensor_model_parallel_world_size"),
}
"""Module -> names that MoLS on an engine uses."""
PROGRAMS: dict[str, tuple[str, ...]] = {
    # training, study
    "deepspeed.ops": ("__compatible_ops__",),
    "deepspeed.runtime.config": ("DeepSpeedConfig",),
    "deepspeed.runtime.config_utils": ("DeepSpeedConfigModel",),
    # export
    "deepspeed.utils.zero_to_fp32": ("get_fp32_state_dict_from_zero_checkpoint",),
    # launch
    "deepspeed.launcher.runner": (
        *("main", "parse_args", "encode_world_info", "argparse", "subprocess", "signal"),
        *("OpenMPIRunner", "MVAPICHRunner", "SlurmRunner"),
    ),
    # doctor
    "deepspeed.env_report": ("ALL_OPS", "installed_ops", "nvcc_version", "probe_is_compatible"),
    "deepspeed.ops.op_builder.all_ops": ("ALL_OPS",),
    "deepspeed.runtime.activation_checkpointing.config": (),
    "deepspeed.runtime.constants": (),
    "deepspeed.runtime.lr_schedules": ("VALID_LR_SCHEDULES",),
    # plan
    "deepspeed.runtime.zero.config": ("DeepSpeedZeroConfig",),
}
"""Module -> names that the programs use, checked when a program needs the module."""


def module(name: str) -> ModuleType:
    """Import a module of the tables. Raises `MolsUnsupportedError` if it or one of its names is missing."""
    names = ATTACHED[name] if name in ATTACHED else PROGRAMS[name]
    try:
        found = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and not name.startswith(error.name):
            raise  # a dependency of DeepSpeed is missing
        raise _refusal(f"there is no module {error.name or name}") from None
    _require(name, found, names)
    return found


def check(engine: Engine) -> None:
    """Check that this engine has all names that MoLS needs.

    Raises:
        MolsUnsupportedError: names the missing name, the installed and the tested version.
    """
    for name in ATTACHED:
        module(name)
    constants = module("deepspeed.checkpoint.constants")
    for name, value in CONSTANTS.items():
        if getattr(constants, name) != value:
            raise _refusal(f"checkpoint/constants.py has {name} = {getattr(constants, name)!r}, not {value!r}")
    _require(f"{type(engine).__name__} (runtime/engine.py)", engine, ENGINE_NAMES)
    if engine.pipeline_parallelism:
        grid = getattr(engine, "grid", None)
        _require(f"{type(engine).__name__}.grid (runtime/pipe/topology.py)", grid, GRID_NAMES)


def check_optimizer(outer: object) -> None:
    """Check that an engine's optimizer has the names that MoLS reads. A class outside the table passes.

    Raises:
        MolsUnsupportedError: as `check`.
    """
    row = OPTIMIZERS.get(type(outer).__name__)
    if row is None:
        return
    where = f"{type(outer).__name__} ({row.file})"
    _require(where, outer, row.names)
    if row.parameters is not None:
        groups, names = row.parameters
        for parameter in (parameter for group in getattr(outer, groups) for parameter in group):
            _require(f"a parameter of {where}", parameter, names)
            break


def _require(where: str, owner: object, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise _refusal(f"{where} has no {', '.join(missing)}")


def _refusal(what: str) -> MolsUnsupportedError:
    try:
        installed = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return MolsUnsupportedError(f"DeepSpeed is not installed ({what}): pip install deepspeed=={TESTED}")
    return MolsUnsupportedError(
        f"MoLS does not support DeepSpeed {installed}: {what}; install {TESTED}, which MoLS was tested with, or report "
        "this version"
    )


# ------------------------------------------------------------------ names that several places use


def load_options(*args: Any, **kwargs: Any) -> Config:
    """What these arguments of `engine.load_checkpoint` ask for, by name, and what a replacement takes besides."""
    return {**LOAD_CHECKPOINT, **dict(zip(LOAD_CHECKPOINT, args, strict=False)), **kwargs}


def mpu_rank(mpu: object) -> int:
    """This process's rank within one data-parallel copy of the model."""
    return int(module("deepspeed.utils.bwc").bwc_tensor_model_parallel_rank(mpu))


def mpu_size(mpu: object) -> int:
    """Number of ranks of one data-parallel copy of the model."""
    return int(module("deepspeed.utils.bwc").bwc_tensor_model_parallel_world_size(mpu))


def other_world_error() -> type[Exception]:
    """Error class of the ZeRO checkpoint loaders for another number of ranks."""
    error: type[Exception] = module("deepspeed.runtime.zero.utils").ZeRORuntimeException
    return error


def local_part(parameter: nn.Parameter) -> Tensor | None:
    """Return the tensor that this rank has of a parameter, its part at ZeRO stage 3; None if it is on NVMe."""
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    size = getattr(parameter, "partition_numel", parameter.numel)()
    return part if part.numel() == size else None


class RngTracker(Protocol):
    """DeepSpeed's `CudaRNGStatesTracker`: one RNG state per name."""

    def get_states(self) -> dict[str, Tensor]: ...

    def set_states(self, states: dict[str, Tensor]) -> None: ...


def rng_tracker() -> RngTracker:
    """Return the RNG tracker of DeepSpeed's activation checkpointing for model parallelism; empty without it."""
    tracker: RngTracker = module("deepspeed.runtime.activation_checkpointing.checkpointing").get_cuda_rng_tracker()
    return tracker


def skip_shm_kernel() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce (a minute before the first step): gloo is enough."""
    module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
