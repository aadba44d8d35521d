"""Precision of a Megatron run, precision of its gradient samples, and Megatron optimizers that MoLS does not support.

Without Transformer Engine, `TransformerConfig` still accepts FP8, names of Transformer Engine are mocks, and the run
fails late with an unclear error. So `megatron_patches.machine` checks for the package, by name and by a real import.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from packaging.version import Version
from torch import nn

from megatron_patches.compat import Wrapper
from megatron_patches.machine import RECIPES, Machine, probe_machine
from mols_ds.core.config import Mode
from mols_ds.errors import MolsConfigError, MolsUnsupportedError
from mols_ds.optim.catalog import MEGATRON
from mols_ds.optim.traits import has_adam_moments, has_several_betas, reads_groups_only, unscaled_refusal


class Refusal(NamedTuple):
    """An unsupported setting: whether it applies, what it is and why, and the fix."""

    applies: bool
    what: str
    way_out: str


# ------------------------------------------------------------------ checks of a config


def _asked(config: object) -> tuple[str, str] | None:
    """Return ("fp8" or "fp4", recipe) of a TransformerConfig, or None."""
    for kind, default in (("fp8", "delayed"), ("fp4", "nvfp4")):
        if getattr(config, kind, None):
            recipe = getattr(config, f"{kind}_recipe", None) or default
            return kind, str(getattr(recipe, "value", recipe))
    return None


def check(
    model_config: object,
    optimizer_config: object = None,
    *,
    machine: Machine | None = None,
) -> None:
    """Check that this machine supports a precision, before anything is built.

    Args:
        model_config, optimizer_config: Megatron's TransformerConfig and OptimizerConfig, or None.
        machine: what is installed; None: looks for it.

    Raises:
        MolsUnsupportedError: FP8 or FP4 without Transformer Engine, on an unsupported device, or with a version that
            lacks the recipe; fused weight gradients without apex's kernel; primary weights in FP4; CUDA graphs of full
            iterations.
        MolsConfigError: an unknown recipe, or different recipes for model and optimizer.
    """
    machine = probe_machine() if machine is None else machine
    asked = _asked(model_config)
    if asked is not None:
        _check_low_precision(*asked, machine)
        recipe = getattr(optimizer_config, "fp8_recipe", None)
        if asked[0] == "fp8" and recipe is not None and str(getattr(recipe, "value", recipe)) != asked[1]:
            raise MolsConfigError(
                f"fp8_recipe: the model has {asked[1]!r}, the optimizer {recipe!r}; give both the same"
            )
    if getattr(model_config, "gradient_accumulation_fusion", False) and not machine.wgrad_kernel:
        raise MolsUnsupportedError(
            "gradient_accumulation_fusion needs apex's fused_weight_gradient_mlp_cuda, which is missing (the output "
            "layer is Megatron's also with Transformer Engine): build apex with its CUDA extensions or set "
            "gradient_accumulation_fusion to false"
        )
    # Settings that do not work on any machine: a missing partner setting, or bypassed forward hooks.
    if getattr(model_config, "fp4_param", False):
        raise MolsUnsupportedError(
            "MoLS does not support fp4_param (primary weights in FP4): they need the optimizer's fp4_param_gather; set "
            "fp4_param to false"
        )
    scopes = getattr(model_config, "cuda_graph_scope", None) or ()
    scopes = scopes.split(",") if isinstance(scopes, str) else scopes
    if any("full_iteration" in (scope, getattr(scope, "name", None)) for scope in scopes):
        raise MolsUnsupportedError(
            "MoLS does not support CUDA graphs of full iterations (cuda_graph_scope full_iteration): a replayed "
            "forward calls no hook, so a probe window could not give the random state back; use cuda_graph_scope attn, "
            "or cuda_graph_impl none"
        )


def _check_low_precision(kind: str, recipe: str, machine: Machine) -> None:
    if recipe not in RECIPES:
        raise MolsConfigError(f"{kind}_recipe: {recipe!r} is not one of {', '.join(RECIPES)}")
    need, way_out = RECIPES[recipe], f"or leave {kind} out and train in bf16"
    if machine.engine is None:
        raise MolsUnsupportedError(
            f"{kind} (recipe {recipe}) needs Transformer Engine: {machine.engine_missing}; install "
            f"transformer_engine[pytorch] {need.engine.removesuffix('.dev0')} or newer, {way_out}"
        )
    least = ".".join(map(str, need.capability))
    if machine.capability is None:
        raise MolsUnsupportedError(
            f"{kind} (recipe {recipe}) needs a CUDA device of compute capability {least}, and this process has none; "
            f"run it on one, {way_out}"
        )
    if machine.capability < need.capability:
        now = ".".join(map(str, machine.capability))
        others = [name for name, other in RECIPES.items() if kind == "fp8" and other.capability <= machine.capability]
        hint = f"take recipe {' or '.join(n for n in others if n != 'custom')}, " if others else ""
        raise MolsUnsupportedError(
            f"{kind} (recipe {recipe}) needs compute capability {least} or newer, this device has {now}; "
            f"{hint}{way_out}"
        )
    if need.below is not None and machine.capability >= need.below:
        raise MolsUnsupportedError(
            f"{kind} (recipe {recipe}): Transformer Engine has it below compute capability "
            f"{'.'.join(map(str, need.below))} only, this device has {'.'.join(map(str, machine.capability))}; take "
            f"another recipe, {way_out}"
        )
    if need.cuda is not None and (machine.cuda is None or machine.cuda < need.cuda):
        now = "none" if machine.cuda is None else ".".join(map(str, machine.cuda))
        raise MolsUnsupportedError(
            f"{kind} (recipe {recipe}) needs CUDA {'.'.join(map(str, need.cuda))} or newer, torch was built with "
            f"{now}; take another recipe, {way_out}"
        )
    if Version(machine.engine) < Version(need.engine):
        raise MolsUnsupportedError(
            f"{kind} (recipe {recipe}) needs Transformer Engine {need.engine.removesuffix('.dev0')} or newer, "
            f"{machine.engine} is installed; upgrade it, {way_out}"
        )


# ------------------------------------------------------------------ description of a run


def describe(
    model_config: object = None, optimizer: object = None, *, machine: Machine | None = None
) -> dict[str, str]:
    """Describe the precision of a run and of its gradient samples. A missing argument gives defaults.

    Args:
        model_config: TransformerConfig.
        optimizer: a built MegatronOptimizer (or ChainedOptimizer).
        machine: as in `check`.

    Returns:
        Entries of the report's "versions": "transformer_engine"; "low_precision": format and recipe of the matrix
        products; "statistics": the gradient samples in one phrase; "optimizer": source of the inner optimizer.
    """
    machine = probe_machine() if machine is None else machine
    kind, recipe = _asked(model_config) or (None, None)
    primary = kind is not None and bool(getattr(model_config, f"{kind}_param", False))
    # FP8 and FP4 weights report bfloat16 too.
    dtype = str(getattr(model_config, "params_dtype", torch.float32)).removeprefix("torch.")
    weights = f"{kind} primary weights" if primary else f"{dtype} weights"
    samples = f"{_gradient_dtype(optimizer) or 'float32'} main_grad of {weights}"
    if kind:
        samples += f", from {kind} matrix products (recipe {recipe}), scales divided out"
    if getattr(model_config, "gradient_accumulation_fusion", False):
        samples += ", accumulated by the fused weight-gradient product"
    return {
        "transformer_engine": machine.engine or f"none ({machine.engine_missing})",
        "low_precision": (f"{kind}/{recipe}" if kind else "none") + (", primary weights" if primary else ""),
        "statistics": samples,
        "optimizer": _optimizer_source(optimizer),
    }


def _inner(optimizer: object) -> Iterator[Wrapper]:
    """Yield the Megatron optimizers of a (possibly chained) optimizer."""
    if optimizer is not None:
        yield from getattr(optimizer, "chained_optimizers", [optimizer])


def inner_optimizers(optimizer: object) -> list[torch.optim.Optimizer]:
    """Return the inner optimizers of Megatron's optimizers. A rank without parameters has none."""
    return [one.optimizer for one in _inner(optimizer) if getattr(one, "optimizer", None) is not None]


def _model_parameters(one: Wrapper) -> Iterator[nn.Parameter]:
    """Yield the model parameters of one Megatron optimizer. They have `main_grad`."""
    yield from getattr(one, "model_param_gbuf_map", ())
    for name in ("float16_groups", "fp32_from_fp32_groups"):
        for group in getattr(one, name, ()):
            yield from group
    for group in getattr(getattr(one, "optimizer", None), "param_groups", ()):
        yield from group["params"]


def _gradient_dtype(optimizer: object) -> str | None:
    """Return the dtype of the reduced gradients: float32, or bfloat16 where `grad_reduce_in_fp32` is off."""
    for one in _inner(optimizer):
        for parameter in _model_parameters(one):
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None:
                return str(gradient.dtype).removeprefix("torch.")
    return None


def _optimizer_source(optimizer: object) -> str:
    """Return the package of the inner optimizer; without one, the package of Megatron's default Adam."""
    kinds = [type(one) for one in inner_optimizers(optimizer)]
    if not kinds:
        from megatron.core import optimizer as module

        kinds = [module.Adam]
    names = []
    for kind in kinds:
        root = kind.__module__.split(".")[0]
        if root in ("apex", "transformer_engine"):
            names.append(root)
        else:
            names.append(f"torch.optim.{kind.__name__}" if kind.__module__.startswith("torch.optim") else kind.__name__)
    return ", ".join(dict.fromkeys(names))


# ------------------------------------------------------------------ unsupported optimizers


def _is_a(thing: object, *names: str) -> bool:
    """Return whether a base class has one of these names, in any module and version."""
    return any(kind.__name__ in names for kind in type(thing).__mro__)


def optimizer_refusals(
    optimizer: object, mode: Mode | None, *, fused: bool = False, unscaled: bool = False
) -> list[Refusal]:
    """Return the unsupported settings of a Megatron optimizer, each with whether it applies.

    Args:
        optimizer: from get_megatron_optimizer.
        mode: mode of measurement; None for given alphas.
        fused: whether a parameter has rows of several groups (`linear_qkv`), so that MoLS scales ranges.
        unscaled: whether weight decay keeps the base rate.
    """
    every = list(_inner(optimizer))
    # An empty chain has no config. Its members share one config object.
    found = [getattr(one, "config", None) for one in (optimizer, *every)]
    configs = [config for config in found if config is not None]
    inner = inner_optimizers(optimizer)
    layouts = [getattr(one, "ddp_config", None) for one in every]

    def asks(name: str) -> bool:
        return any(bool(getattr(config, name, False)) for config in configs)

    names = {str(getattr(config, "optimizer", "adam")).lower() for config in configs}
    other = sorted(name for name in names if name not in MEGATRON)
    fsdp = any(getattr(layout, "use_megatron_fsdp", False) for layout in layouts)
    sharded = any(_is_a(one, "FullyShardedOptimizer") for one in (optimizer, *every)) or any(
        _is_a(parameter, "DTensor") for one in every for parameter in _model_parameters(one)
    )
    return [
        Refusal(
            any(_is_a(one, "LayerWiseDistributedOptimizer") for one in (optimizer, *every))
            or asks("use_layer_wise_distributed_optimizer"),
            "the layer-wise distributed optimizer: it assigns full layers to ranks and has its own step",
            "use_distributed_optimizer with optimizer 'adam'",
        ),
        Refusal(
            bool(other),
            f"optimizer {', '.join(map(repr, other))}: its update depends on a whole matrix, which the "
            "signal-to-noise ratio of single elements says nothing about",
            f"one of {', '.join(map(repr, MEGATRON))}",
        ),
        Refusal(
            asks("optimizer_cpu_offload") or any(_is_a(one, "HybridDeviceOptimizer") for one in inner),
            "optimizer_cpu_offload (HybridDeviceOptimizer): it steps copies in its own optimizers",
            "optimizer_cpu_offload: false; the accumulators of MoLS are in host memory by default",
        ),
        Refusal(
            asks("optimizer_cuda_graph"),
            "optimizer_cuda_graph: the captured step has fixed rates",
            "optimizer_cuda_graph: false",
        ),
        Refusal(
            fsdp,
            "Megatron-FSDP: its parameters are shards that this package does not read",
            "use_megatron_fsdp: false with use_distributed_optimizer",
        ),
        Refusal(
            sharded and not fsdp,
            "fully sharded parameters (FSDP 2): they are DTensors, which this package does not read",
            "DistributedDataParallel with use_distributed_optimizer",
        ),
        Refusal(
            mode == "probe" and asks("reuse_grad_buf_for_mxfp8_param_ag"),
            "reuse_grad_buf_for_mxfp8_param_ag in mode 'probe': the gradient buffer doubles as the buffer of the "
            "parameters, so a step that is skipped would leave the next forward without them",
            'mode "online", or reuse_grad_buf_for_mxfp8_param_ag: false',
        ),
        *_precision_aware_refusals(asks("use_precision_aware_optimizer_no_fp8_or_ds_fp8"), fused, inner),
        *_moments_refusals(mode, inner, configs),
        *(Refusal(True, *refusal) for one in inner if unscaled and (refusal := unscaled_refusal(one)) is not None),
    ]


def _precision_aware_refusals(asked: bool, fused: bool, inner: Sequence[torch.optim.Optimizer]) -> list[Refusal]:
    """Return the unsupported settings of use_precision_aware_optimizer: its fp32 weights are in its state."""
    return [
        Refusal(
            asked and fused,
            "use_precision_aware_optimizer with fused parameters (linear_qkv holds rows of two groups): the fp32 "
            "weights are hidden in the optimizer's state, so single rows cannot be scaled",
            "use_precision_aware_optimizer: false, or rules that put a fused parameter in one group",
        ),
        Refusal(
            asked and not all(reads_groups_only(one) for one in inner),
            "use_precision_aware_optimizer with an optimizer class that is not in the catalog: its fp32 weights are "
            "hidden in its state, so the weights cannot be corrected after its step",
            "use_precision_aware_optimizer: false, or Transformer Engine's FusedAdam",
        ),
    ]


def _moments_refusals(
    mode: Mode | None, inner: Sequence[torch.optim.Optimizer], configs: Sequence[object]
) -> list[Refusal]:
    """Return the unsupported settings of mode "moments"."""
    low = [getattr(config, key, torch.float32) for config in configs for key in ("exp_avg_dtype", "exp_avg_sq_dtype")]
    return [
        Refusal(
            # An unknown class must be called an Adam too.
            mode == "moments"
            and not all(has_adam_moments(one) and "adam" in type(one).__name__.lower() for one in inner),
            "mode 'moments' with an optimizer that keeps no Adam moments",
            'mode "probe" or "online"',
        ),
        Refusal(
            mode == "moments" and any(has_several_betas(one) for one in inner),
            "mode 'moments' with other betas in one parameter group than in another",
            'mode "probe" or "online"',
        ),
        Refusal(
            mode == "moments" and any(dtype != torch.float32 for dtype in low),
            "mode 'moments' with exp_avg_dtype or exp_avg_sq_dtype below fp32: the stored moments are scaled",
            'fp32 moments, or mode "probe" or "online"',
        ),
    ]
