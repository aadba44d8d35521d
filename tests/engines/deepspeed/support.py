"""What the tests on the real engine share: configs, engines, the training loop, weights, who owns which elements."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers.oracle.adamw import AdamSettings
from tests.helpers.oracle.models import SEQUENCES, batch, build, loss_of

STAGES = (0, 1, 2, 3)
MICROS = 2  # gradient accumulation
CLIP = 0.5  # below the gradient norm of the tiny models (6 to 10), so that clipping always acts
SUB_GROUP = 5_000  # elements: several sub-groups at stage 3
PERSISTENT_BELOW = 100  # elements: at stage 3 norms stay whole on every rank, matrices are partitioned

if "RANK" in os.environ:  # a rank of the harness, not pytest's own process
    sys.modules.setdefault("matplotlib", None)  # type: ignore[arg-type]  # no plots from here: seconds for each engine


def config(
    stage: int, mols: Mapping[str, Any] | None = None, *, dtype: str = "float32", micros: int = MICROS, **more: Any
) -> dict[str, Any]:
    """A DeepSpeed config; `more` are top-level keys, `mols` the section (left out if None)."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {"sub_group_size": SUB_GROUP, "stage3_param_persistence_threshold": PERSISTENT_BELOW}
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": SEQUENCES,
        "gradient_accumulation_steps": micros,
        "gradient_clipping": CLIP,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "bf16": {"enabled": dtype == "bfloat16"},
        **more,
    }
    if mols is not None:
        result["mols"] = dict(mols)
    return result


def parameter_groups(model: nn.Module, settings: AdamSettings) -> list[dict[str, Any]]:
    """Two groups, as usual: matrices with weight decay, vectors without it (and here with a rate of their own)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "lr": settings.lr, "weight_decay": settings.weight_decay},
        {
            "params": [p for p in trainable if p.ndim < 2],
            "lr": settings.lr * settings.vector_lr_factor,
            "weight_decay": 0.0,
        },
    ]


def adamw(model: nn.Module, settings: AdamSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(model, settings), betas=(settings.beta1, settings.beta2), eps=settings.eps
    )


def engine_of(
    name: str,
    settings: AdamSettings,
    ds_config: Mapping[str, Any],
    *,
    initialize: Callable[..., Any] | None = None,
    schedule: Callable[[int], float] | None = None,
    scale: int = 1,
) -> Any:
    """An engine for one of the tiny models; `initialize` defaults to mols_ds.initialize."""
    if initialize is None:
        import mols_ds

        initialize = mols_ds.initialize
    model = build(name, scale=scale)
    optimizer = adamw(model, settings)
    scheduler = None if schedule is None else torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    return initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=dict(ds_config))[0]


def iterate(engine: Any, iteration: int, micros: int = MICROS) -> None:
    """One pass of a user's loop: `micros` micro-batches, `engine.step()` after each."""
    for micro in range(micros):
        engine.backward(loss_of(engine, batch(iteration, micro, dist.get_rank())))
        engine.step()


def full_weights(engine: Any) -> dict[str, Tensor]:
    """Copies of the whole parameters, float32, on every rank."""
    result = {}
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                result[name] = parameter.data.float().clone()
        else:
            result[name] = parameter.data.float().clone()
    return result


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer that takes the step."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def fingerprint(engine: Any) -> dict[str, str]:
    """Hashes of weights, optimizer state, rates, scheduler and counters: equal means equal bit for bit."""
    state = {f"weight {name}": _digest(weight) for name, weight in full_weights(engine).items()}
    inner = inner_optimizer(engine)
    for position, values in enumerate(inner.state.values()):
        for key, value in values.items():
            state[f"state {position} {key}"] = _digest(value) if isinstance(value, Tensor) else repr(value)
    for position, group in enumerate(inner.param_groups):
        state[f"group {position}"] = repr({k: v for k, v in group.items() if k != "params"})
    state["scheduler"] = repr(engine.lr_scheduler.last_epoch) if engine.lr_scheduler else ""
    state["counters"] = repr((engine.global_steps, engine.micro_steps, engine.global_samples, engine.skipped_steps))
    return state


def _digest(tensor: Tensor) -> str:
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def owned(engine: Any) -> list[tuple[str, int, int, int]]:
    """(parameter, start, numel, numel of the whole parameter) of every piece that this rank's optimizer steps.

    Read from DeepSpeed's own tables, as documented by its 0.19 sources, without the product. Stage 0: everything.
    """
    outer, names, pieces = engine.optimizer, engine.param_names, []
    if hasattr(outer, "fp32_partitioned_groups_flat"):
        for group in outer.fp16_groups:
            for p in group:
                length = outer.grad_position[outer.get_param_id(p)][2]
                start = dist.get_rank(p.ds_process_group) * length
                pieces.append((names[p], start, min(length, p.ds_numel - start), p.ds_numel))
    elif hasattr(outer, "single_partition_of_fp32_groups"):
        for i, group in enumerate(outer.params_in_partition):
            rank = dist.get_rank(outer.real_dp_process_group[i])
            for p in group:
                key = outer.get_param_id(p)
                start = int(outer.grad_start_offset[i][rank][key])
                offset = int(outer.grad_partition_insertion_offset[i][rank][key])
                pieces.append(
                    (names[p], start, min(p.numel() - start, int(outer.partition_size[i]) - offset), p.numel())
                )
    else:
        pieces = [(name, 0, p.numel(), p.numel()) for name, p in engine.module.named_parameters()]
    return [piece for piece in pieces if piece[2] > 0]
