"""Try out an optimizer class that the catalog does not know: is its step proportional to the learning rate?

MoLS corrects its steps (`mols_ds.core.lr_scaler`), which is only right then. It is wrong for schedule-free and
Lookahead wrappers, optimizers that set their own rate, and clipped or adaptive bounds on the rate.
"""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mols_ds.core.layout import ElementLayout
from mols_ds.core.lr_scaler import LRScaler, make_plan
from mols_ds.core.ranges import ShardRange
from mols_ds.errors import MolsWarning
from mols_ds.optim.catalog import CLASSES, PACKAGES, OptimizerClass, class_facts
from mols_ds.optim.traits import adds_decay, reads_groups_only

STEPS = 8
RATE = 1e-3
MULTIPLIER = 3.0
TOLERANCE = 2e-3
"""Largest distance between the two runs, relative to the distance that the weights moved. fp64 rounding gives 1e-12."""
MAX_GROUPS = 4
WHOLE = ElementLayout.whole("all")


def class_refusal(optimizer: Any) -> tuple[str, str] | None:
    """Return (what MoLS does not support, what to do instead) for an inner optimizer, by the catalog or by a trial."""
    found = class_facts(optimizer).refusal(getattr(optimizer, "param_groups", []))
    if found is None and isinstance(optimizer, Optimizer):
        found = refusal(optimizer)
    return found


def refusal(optimizer: Optimizer) -> tuple[str, str] | None:
    """Return (what MoLS does not support, what to do instead) if an unknown optimizer's step is not proportional to lr.

    A small copy takes 8 steps with all multipliers 3, another copy with lr x 3. Every rank gets the same answer. Warns
    if the class cannot be tried.
    """
    name = type(optimizer).__name__
    # A name alone is not enough: anybody may call a class AdamW.
    named = name in CLASSES and type(optimizer).__module__.split(".")[0] in PACKAGES
    if named or reads_groups_only(optimizer):
        return None
    error = _distance(optimizer)
    if error is None:
        warnings.warn(
            f"optimizer {name} is not in MoLS' catalog and could not be tested: scaled steps are right only if they "
            "are proportional to lr; compare a run with all fixed_alphas 2 to one with twice the lr",
            MolsWarning,
            stacklevel=2,
        )
        return None
    if error <= TOLERANCE:
        return None
    return (
        f"{name} (its step is not proportional to lr: in a trial with all multipliers {MULTIPLIER:g} its weights "
        f"differed by {error:.2g} of their way from those of lr x {MULTIPLIER:g})",
        OptimizerClass(name=name).instead,
    )


def decay_in_moments(optimizer: Any) -> bool:
    """Whether weight decay is added to the gradients that Adam's moments are made of.

    By the catalog; a small copy of a class that it does not know takes a step with gradients of zero. False where that
    cannot be tried.
    """
    decaying = [group for group in getattr(optimizer, "param_groups", []) if group.get("weight_decay")]
    added = [adds_decay(optimizer, group) for group in decaying]
    if None not in added:
        return any(added)
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.enable_grad():
            weights = _weights(optimizer, torch.float32)
            small = _small_copy(optimizer, weights, RATE)
            for weight in _flatten(weights):
                weight.grad = torch.zeros_like(weight)
            small.step()
            return any(bool(small.state[w]["exp_avg"].any()) for w in _flatten(weights))
    except Exception:  # a constructor or a step of somebody else's class, called without what it may need
        return False


def _distance(optimizer: Optimizer) -> float | None:
    """Return the distance of both runs relative to the distance that the weights moved; None if a trial fails."""
    for dtype in (torch.float64, torch.float32):  # some kernels have no fp64
        try:
            with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wanted = _run(optimizer, dtype, MULTIPLIER * RATE, 1.0)
                error = float((_run(optimizer, dtype, RATE, MULTIPLIER) - wanted).norm())
                way = float((wanted - _flat(_weights(optimizer, dtype))).norm())
        except Exception:  # a foreign constructor or step that needs something else
            continue
        if way > 0 and math.isfinite(error):
            return error / way
    return None


def _run(optimizer: Optimizer, dtype: torch.dtype, lr: float, multiplier: float) -> Tensor:
    """Return the weights of a small copy of `optimizer` after the steps of a trial."""
    torch.manual_seed(0)
    weights = _weights(optimizer, dtype)
    small = _small_copy(optimizer, weights, lr)
    plans = {id(w): make_plan(w.numel(), [ShardRange("w", 0, 0, w.numel())], {"w": WHOLE}) for w in _flatten(weights)}
    scaler = LRScaler(small, plans, lambda: {"all": multiplier}, elementwise=False)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for weight in _flatten(weights):
            noise = torch.randn(weight.shape, generator=generator, dtype=dtype)
            weight.grad = 0.1 * noise + 0.2 * weight.detach()
        small.step()
        scaler.restore()
    return _flat(weights)


def _small_copy(optimizer: Optimizer, weights: list[list[nn.Parameter]], lr: float) -> Optimizer:
    """Create the same class with the same group settings on other weights."""
    make: Any = type(optimizer)
    known = inspect.signature(make.__init__).parameters
    settings = {key: value for key, value in optimizer.defaults.items() if key in known and key != "lr"}
    groups = [
        {key: group[key] for key in optimizer.defaults if key in group and key != "lr"} | {"params": part, "lr": lr}
        for group, part in zip(_groups(optimizer), weights, strict=True)
    ]
    small: Optimizer = make(groups, lr=lr, **settings)
    train = getattr(small, "train", None)
    if callable(train):
        train()
    return small


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [group for group in optimizer.param_groups if group["params"]][:MAX_GROUPS]


def _weights(optimizer: Optimizer, dtype: torch.dtype) -> list[list[nn.Parameter]]:
    """Make a vector per parameter group, and a matrix unless the optimizer only has vectors."""
    flat = all(p.dim() <= 1 for group in optimizer.param_groups for p in group["params"])
    generator = torch.Generator().manual_seed(1)
    return [
        [
            nn.Parameter(0.3 * torch.randn(size, generator=generator, dtype=dtype))
            for size in ((16,), (16, 8))[: 1 if flat else 2]
        ]
        for _ in _groups(optimizer)
    ]


def _flatten(weights: list[list[nn.Parameter]]) -> list[nn.Parameter]:
    return [weight for part in weights for weight in part]


def _flat(weights: list[list[nn.Parameter]]) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in _flatten(weights)])
