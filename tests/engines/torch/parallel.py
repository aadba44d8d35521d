"""The ways to run a tiny model on plain torch, a user's loop over it, and its whole weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.harness import draw_nothing
from tests.helpers.oracle.models import batch, build, loss_of

draw_nothing()
MICROS = 2  # gradient accumulation
CLIP = 0.5  # below the gradient norm of the tiny models (6 to 10), so that clipping always acts

DATA = {"one": 1, "ddp": 2, "fsdp2": 2, "fsdp2 columns": 2, "fsdp2 bf16": 2, "fsdp2 offload": 2, "hsdp": 4, "tp": 1}
DATA |= {"2d": 2}
"""Way to run -> number of ranks with data of their own."""
WORLD = {"one": 1, "hsdp": 4, "2d": 4}
"""Way to run -> number of ranks, where it is not 2."""


def data_rank(how: str) -> int:
    """Which part of the global batch this rank reads."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return rank * DATA[how] // WORLD.get(how, 2)


def layers_of(model: nn.Module) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def wrapped(how: str, model: nn.Module) -> nn.Module:
    """The model as the loop calls it."""
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "tp":
        return tensor_parallel(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    if how == "2d":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        return sharded(tensor_parallel(model, mesh["tp"]), mesh=mesh["dp"])
    if how == "hsdp":
        return sharded(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    if how.startswith("fsdp2"):
        return sharded(model, **FSDP2[how])
    assert how == "one"
    return model


def by_columns(parameter: nn.Parameter) -> Shard:
    """Shard matrices of even width by columns."""
    return Shard(1) if parameter.ndim > 1 and parameter.shape[1] % 2 == 0 else Shard(0)


FSDP2: dict[str, dict[str, Any]] = {
    "fsdp2": {},
    "fsdp2 columns": {"shard_placement_fn": by_columns},
    "fsdp2 bf16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "fsdp2 offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    for layer in layers_of(model):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def tensor_parallel(model: nn.Module, mesh: Any) -> nn.Module:
    """LLaMA: columns of q, k, v, gate and up, rows of o and down; the vocabulary (97) and the MLP (67) unevenly."""
    rows = {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    columns = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    columns |= {f"mlp.{name}_proj": ColwiseParallel(use_local_output=False) for name in ("gate", "up")}
    for layer in layers_of(model):
        parallelize_module(layer, mesh, {**rows, **columns})
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            replicated(norm, mesh)
    replicated(model.model.norm, mesh)
    head = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    return parallelize_module(model, mesh, {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate()), **head})


def replicated(module: nn.Module, mesh: Any) -> None:
    """Make its parameters replicated DTensors, because torch's optimizers and clipping do not mix kinds of tensors."""

    def enter(module: nn.Module, args: Any, mesh: Any) -> Any:
        return tuple(DTensor.from_local(value, mesh, [Replicate()]) for value in args)

    distribute_module(module, mesh, None, enter, lambda module, output, mesh: output.to_local())


def backward(how: str, run: nn.Module, iteration: int, spoil: Callable[[Tensor], Tensor] = lambda loss: loss) -> None:
    """One global batch of MICROS micro-batches."""
    for micro in range(MICROS):
        last = micro == MICROS - 1
        with run.no_sync() if how == "ddp" and not last else contextlib.nullcontext():
            (spoil(loss_of(run, batch(iteration, micro, data_rank(how)))) / MICROS).backward()


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the whole parameters, on every rank."""
    every = {name: p.detach() for name, p in model.named_parameters()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in every.items()}


def placed(model: nn.Module, mesh: Any, placements: Callable[[str, nn.Parameter], Any]) -> nn.Module:
    """Replace every parameter by a DTensor. Such a model is not run: its gradients come from another one."""
    shards = {
        parameter: nn.Parameter(
            distribute_tensor(parameter.detach(), mesh, placements(name, parameter), src_data_rank=None)
        )
        for name, parameter in model.named_parameters()
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = shards[parameter]
    return model


def tiny(name: str) -> nn.Module:
    return build(name)
