"""Engines for the tests on DeepSpeed: configs of every stage and precision, and one function to build an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import deepspeed
import torch
from torch import nn

from tests.engines.deepspeed.models import model_of
from tests.helpers.harness import draw_nothing
from tests.helpers.oracle.adamw import AdamSettings
from tests.helpers.oracle.models import SEQUENCES, groups_of

draw_nothing()

STAGES = (0, 1, 2, 3)
MICROS = 2  # gradient accumulation
CLIP = 0.5  # below the gradient norm of the tiny models (6 to 10), so that clipping always acts
SUB_GROUP = 5_000  # elements: several sub-groups at stage 3
PERSISTENT_BELOW = 100  # elements: at stage 3 norms stay whole on every rank, matrices are partitioned
LR = 2e-3

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"bf16": {"enabled": False}},
    "bf16": {"bf16": {"enabled": True}},
    # BF16_Optimizer at stage 1
    "bf16 fp32 grads": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    # A window of 3: the dynamic scale grows after every third good step.
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 3, "hysteresis": 1}},
}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
OFFLOAD_ALL = {**OFFLOAD, "offload_param": {"device": "cpu", "pin_memory": False}}

Optimizer = torch.optim.Optimizer | Callable[[Iterable[Any]], torch.optim.Optimizer] | AdamSettings


def config(
    stage: int,
    mols: Mapping[str, Any] | None = None,
    *,
    precision: str = "fp32",
    zero: Mapping[str, Any] | None = None,
    micros: int = MICROS,
    **more: Any,
) -> dict[str, Any]:
    """A DeepSpeed config.

    Args:
        stage: of ZeRO.
        mols: the "mols" section, left out if None.
        precision: of PRECISIONS.
        zero: further keys of "zero_optimization".
        micros: micro-batches of a step.
        more: further keys at the top.
    """
    if precision == "fp16":
        _allow_fp16()
    sizes = {"sub_group_size": SUB_GROUP, "stage3_param_persistence_threshold": PERSISTENT_BELOW} if stage == 3 else {}
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": SEQUENCES,
        "gradient_accumulation_steps": micros,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, **sizes, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **PRECISIONS[precision],
        **more,
    }
    if mols is not None:
        result["mols"] = dict(mols)
    return result


def _allow_fp16() -> None:
    """DeepSpeed's CPU accelerator refuses fp16, which today's torch computes on CPUs well enough for tests."""
    type(deepspeed.accelerator.get_accelerator()).is_fp16_supported = lambda self: True


def adamw(model: nn.Module, settings: AdamSettings) -> torch.optim.AdamW:
    """AdamW with the two groups of `groups_of`."""
    groups = groups_of(model, settings.lr, settings.lr * settings.vector_lr_factor, settings.weight_decay)
    return torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)


def engine_of(
    ds_config: Mapping[str, Any],
    model: nn.Module | str = "llama",
    optimizer: Optimizer | None = None,
    *,
    initialize: Callable[..., Any] | None = None,
    schedule: Callable[[int], float] | None = None,
    **arguments: Any,
) -> Any:
    """An engine.

    Args:
        ds_config: see `config`.
        model: a module, or one of the tiny ones by name.
        optimizer: an instance, a function of the parameters, or settings of AdamW; by default what the config names,
            else AdamW of two groups with the rates LR and 2 LR.
        initialize: default mols_ds.initialize.
        schedule: the base rate's factor in each update, for a scheduler of torch's.
        arguments: of `initialize`.
    """
    import mols_ds

    module = model_of(model) if isinstance(model, str) else model
    if isinstance(optimizer, AdamSettings):
        optimizer = adamw(module, optimizer)
    elif optimizer is None and "optimizer" not in ds_config:
        optimizer = torch.optim.AdamW(groups_of(module, LR, 2 * LR, 0.1), betas=(0.9, 0.95))
    if optimizer is not None:
        arguments["optimizer"] = optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        arguments.setdefault("model_parameters", [p for p in module.parameters() if p.requires_grad])
    elif schedule is not None:
        arguments["lr_scheduler"] = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    return (initialize or mols_ds.initialize)(model=module, config=dict(ds_config), **arguments)[0]
