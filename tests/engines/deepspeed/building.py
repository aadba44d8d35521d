"""Engines of every layout and precision for the tests of probes and of odd engines."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mols_ds.engines.deepspeed.shards import find_shards
from tests.engines.deepspeed.support import MICROS, config
from tests.helpers.oracle.models import batch, build, loss_of

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    # BF16_Optimizer at stage 1
    "bf16 fp32 grads": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    # A window of 3: the dynamic scale grows after every third good step.
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 3, "hysteresis": 1}},
}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
OFFLOAD_ALL = {**OFFLOAD, "offload_param": {"device": "cpu", "pin_memory": False}}
LR = 2e-3


def allow_fp16() -> None:
    """DeepSpeed's CPU accelerator refuses fp16, which today's torch computes on CPUs well enough for tests."""
    type(deepspeed.accelerator.get_accelerator()).is_fp16_supported = lambda self: True


def ds_config(
    stage: int,
    precision: str = "fp32",
    mols: Mapping[str, Any] | None = None,
    *,
    zero: Mapping[str, Any] | None = None,
    micros: int = MICROS,
    **more: Any,
) -> dict[str, Any]:
    """As `support.config`, with a precision of PRECISIONS and further keys of "zero_optimization"."""
    if precision == "fp16":
        allow_fp16()
    result = config(stage, mols, micros=micros, **{"zero_force_ds_cpu_optimizer": False, **more})
    del result["bf16"]
    result |= PRECISIONS[precision]
    result["zero_optimization"] |= dict(zero or {})
    return result


class PlainLM(nn.Module):
    """No transformers model, no config: names alone tell the groups. Odd sizes: two ranks need padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(97, 19)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(19, 19, bias=False) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(19, 33), nn.Linear(33, 19)
        self.norm = nn.LayerNorm(19)
        self.lm_head = nn.Linear(19, 97, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = self.embed_tokens(input_ids)
        h = torch.nn.functional.scaled_dot_product_attention(
            self.q_proj(x)[:, None], self.k_proj(x)[:, None], self.v_proj(x)[:, None], is_causal=True
        )
        x = x + self.o_proj(h[:, 0])
        x = self.norm(x + self.down_proj(torch.relu(self.up_proj(x))))
        logits = self.lm_head(x)[:, :-1].reshape(-1, 97)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:].reshape(-1))
        return type("Output", (), {"loss": loss})


def model_of(name: str = "llama", *, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """One of the tiny models, or "plain"; `dropout` turns GPT-2's dropout layers on."""
    if name == "plain":
        torch.manual_seed(seed)
        return PlainLM()
    model = build(name, seed=seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


def engine_with(
    settings: Mapping[str, Any],
    model: nn.Module | None = None,
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | torch.optim.Optimizer | None = None,
    *,
    attach: bool = True,
    **arguments: Any,
) -> Any:
    """An engine with MoLS (`attach`) or without; AdamW of two groups unless the config or the caller says otherwise."""
    import mols_ds

    model = model_of() if model is None else model
    if optimizer is None and "optimizer" not in settings:
        optimizer = torch.optim.AdamW(groups_of(model), betas=(0.9, 0.95))
    if optimizer is not None:
        arguments["optimizer"] = optimizer
    if optimizer is None or not isinstance(optimizer, torch.optim.Optimizer):
        arguments.setdefault("model_parameters", [p for p in model.parameters() if p.requires_grad])
    initialize = mols_ds.initialize if attach else deepspeed.initialize
    return initialize(model=model, config=dict(settings), **arguments)[0]


def groups_of(model: nn.Module, lr: float = LR) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors without it and with another rate; `ds_shape` under zero.Init."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) < 2]
    return [
        {"params": matrices, "lr": lr, "weight_decay": 0.1},
        {"params": vectors, "lr": 2 * lr, "weight_decay": 0.0},
    ]


def go(engine: Any, iteration: int, micros: int = MICROS, spoil: Callable[[Tensor], Tensor] | None = None) -> float:
    """One pass of a user's loop over a global batch; `spoil` changes this rank's losses. Returns the last loss."""
    for micro in range(micros):
        loss = loss_of(engine, batch(iteration, micro, dist.get_rank()))
        engine.backward(loss if spoil is None else spoil(loss))
        engine.step()
    return float(loss.detach())


def measure(engine: Any, micros: int = MICROS, start: int = 500, limit: int = 200) -> int:
    """Go on until the alphas exist. Returns the number of iterations."""
    for iteration in range(limit):
        if engine.mols.phase in ("ramping", "fixed"):
            return iteration
        go(engine, start + iteration, micros)
    raise AssertionError(f"still {engine.mols.phase} after {limit} iterations")


def digest(tensor: Tensor) -> str:
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16]


def snapshot(engine: Any) -> dict[str, str]:
    """Digests of all that training depends on. Padding is left out: at stage 3 it is whatever memory held before."""
    shards = find_shards(engine)
    inner, outer = shards.inner, shards.outer
    seen = {"random": digest(torch.get_rng_state())}
    for name, p in engine.module.named_parameters():
        held = p.data
        if hasattr(p, "ds_id"):
            length = p.partition_numel()
            rest = max(0, min(length, p.ds_numel - dist.get_rank(p.ds_process_group) * length))
            held = p.ds_tensor.data.view(-1)[:rest]
        seen[f"weight {name}"] = digest(held)
        seen[f"gradient {name}"] = str(p.grad is not None)
    for tensor, pieces in zip(shards.tensors, shards.ranges, strict=True):
        for piece in pieces:
            where = slice(piece.offset, piece.offset + piece.numel)
            seen[f"master {piece.name}"] = digest(tensor.detach().view(-1)[where])
            for key, value in inner.state.get(tensor, {}).items():
                whole = isinstance(value, Tensor) and value.numel() == tensor.numel()
                seen[f"{key} {piece.name}"] = digest(value.view(-1)[where]) if whole else repr(value)
    for number, group in enumerate(inner.param_groups):
        seen[f"group {number}"] = repr({k: v for k, v in group.items() if k != "params"})
    for name in ("loss_scaler", "loss_scale_config"):
        holder = getattr(outer, name, None)
        if holder is not None:
            seen[name] = repr(sorted((k, v) for k, v in vars(holder).items() if isinstance(v, int | float)))
    seen["overflow"] = repr((getattr(outer, "overflow", None), getattr(outer, "local_overflow", None)))
    seen["micro_step_id"] = repr(getattr(outer, "micro_step_id", None))
    scheduler = engine.lr_scheduler
    seen["scheduler"] = repr(sorted(scheduler.state_dict().items())) if scheduler is not None else ""
    seen["counters"] = repr((engine.global_steps, engine.micro_steps, engine.global_samples, engine.skipped_steps))
    return seen
