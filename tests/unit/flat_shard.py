"""A flat shard of four module groups and NaN padding, its optimizers, and plain torch over separate tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mols_ds.core.groups import ElementLayout
from mols_ds.core.lr_scaler import LRScaler, make_plan
from mols_ds.core.ranges import ShardRange
from mols_ds.optim.traits import has_shared_counter, is_elementwise, parallel_list, reads_groups_only

SIZES = {"qk": 37, "mlp": 53, "other": 11, "head": 29}  # odd: views start at unaligned addresses
PADDING = 7
RATES = {"qk": 0.5, "mlp": 2.0, "other": 1.0, "head": 3.0}
STEPS = 6
LR = 1e-2
GRADIENT_SCALE = 0.3

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1, betas=(0.9, 0.95)),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=LR, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=LR, fused=True),
    "Adam L2": lambda p: torch.optim.Adam(p, lr=LR, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=LR),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=LR),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=LR),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=LR, lr_decay=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=LR),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=LR, momentum=0.9, centered=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=LR, weight_decay=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True),
}


def gradients(numel: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(numel, generator=generator) * GRADIENT_SCALE for _ in range(STEPS)]


def flat_case() -> tuple[Tensor, list[ShardRange], dict[str, ElementLayout]]:
    """A flat shard: one piece a group, then padding that is NaN (as on ZeRO-3)."""
    total = sum(SIZES.values())
    values = torch.randn(total, generator=torch.Generator().manual_seed(0))
    flat = torch.nn.Parameter(torch.cat([values, torch.full((PADDING,), math.nan)]))
    pieces, at = [], 0
    for group, size in SIZES.items():
        pieces.append(ShardRange(f"w_{group}", 0, at, size))
        at += size
    return flat, pieces, {f"w_{group}": ElementLayout.whole(group) for group in SIZES}


def scaled(
    make: Callable[[Any], torch.optim.Optimizer], rates: dict[str, float] | Callable[[], dict[str, float]] = RATES
) -> tuple[Tensor, torch.optim.Optimizer, LRScaler]:
    flat, pieces, layouts = flat_case()
    optimizer = make([flat])
    plans = {id(flat): make_plan(flat.numel(), pieces, layouts)}
    scaler = LRScaler(
        optimizer,
        plans,
        rates if callable(rates) else lambda: rates,
        elementwise=is_elementwise(optimizer),
        shared_counter=has_shared_counter(optimizer),
        groups_only=reads_groups_only(optimizer),
        parallel_list=parallel_list(optimizer),
    )
    return flat, optimizer, scaler


def step_all(flat: Tensor, optimizer: torch.optim.Optimizer) -> None:
    for gradient in gradients(sum(SIZES.values())):
        flat.grad = torch.cat([gradient, torch.zeros(PADDING)])
        optimizer.step()


def separate(make: Callable[[Any], torch.optim.Optimizer], rates: dict[str, float] = RATES) -> Tensor:
    """What an optimizer over one tensor a group, each in a parameter group with its own lr, arrives at."""
    flat, _, _ = flat_case()
    parts = [torch.nn.Parameter(t.clone()) for t in flat.detach()[: -PADDING or None].split(list(SIZES.values()))]
    optimizer = make([{"params": [part], "lr": LR * rates[group]} for group, part in zip(SIZES, parts, strict=True)])
    for gradient in gradients(sum(SIZES.values())):
        for part, piece in zip(parts, gradient.split(list(SIZES.values())), strict=True):
            part.grad = piece.clone()
        optimizer.step()
    return torch.cat([part.detach() for part in parts])


def rate_of_each(rates: dict[str, float] = RATES) -> Tensor:
    return torch.cat([torch.full((size,), rates[group], dtype=torch.float64) for group, size in SIZES.items()])
