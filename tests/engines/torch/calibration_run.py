"""A run with a calibration on plain torch, and its single-process reference."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import mols_ds
from tests.engines.torch.parallel import CLIP, DATA, MICROS, backward, full_weights, tiny, wrapped
from tests.helpers.oracle.adamw import AdamSettings, ElementwiseAdamW, multipliers, ramp
from tests.helpers.oracle.models import batch, cast_parameters, groups_of, loss_of, masks
from tests.helpers.oracle.sizes import VOCABULARY
from tests.helpers.oracle.statistics import GroupValues, gradient_sample, group_values, tokens_of

START, SAMPLES, RAMP_END, UPDATES = 1, 6, 10, 12
REFERENCE = "vo"
EMBEDDING = "model.embed_tokens.weight"  # of the untied models
# eps well above the float noise, which Adam's first steps would turn into full steps
SETTINGS = AdamSettings(lr=1e-3, eps=1e-4, weight_decay=0.1, vector_lr_factor=2.0, clip=CLIP)


def section(mode: str, estimator: str) -> dict[str, Any]:
    return {
        "mode": mode,
        "start": START,
        "samples": SAMPLES,
        "ramp_end": RAMP_END,
        "estimator": estimator,
        "reference": REFERENCE,
        "alpha_min": 0.1,
        "alpha_max": 10.0,
    }


def adamw(model: nn.Module, settings: AdamSettings = SETTINGS, **more: Any) -> torch.optim.AdamW:
    groups = groups_of(model, settings.lr, settings.lr * settings.vector_lr_factor, settings.weight_decay)
    return torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps, **more)


def clipped(model: nn.Module) -> float:
    norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def train(how: str, model: str, mode: str, estimator: str) -> dict[str, Any]:
    """On each rank: UPDATES updates of a user's loop that clips; in mode "probe" SAMPLES discarded steps more."""
    torch.manual_seed(0)
    module = tiny(model)
    run = wrapped(how, module)
    optimizer = adamw(module)
    mols = mols_ds.attach(optimizer, run, section(mode, estimator), total_steps=UPDATES)
    phases, moments, applied = [mols.phase], None, []
    for iteration in range(UPDATES + (SAMPLES if mode == "probe" else 0)):
        backward(how, run, iteration)
        mols.read_gradients()
        clipped(run)
        optimizer.step()
        optimizer.zero_grad()
        phases.append(mols.phase)
        applied.append(mols.multipliers)
        if mode == "moments" and moments is None and mols.phase == "ramping":
            moments = {name: tuple(_full(optimizer.state[p][key]) for key in ("exp_avg", "exp_avg_sq"))
                       for name, p in module.named_parameters()}  # fmt: skip
    return {
        "phases": phases,
        "steps": mols.steps,
        "report": mols.report(),
        "alphas": {group: alpha.hex() for group, alpha in mols.alphas.items()},
        "multipliers": applied,
        "moments": moments,
        "owned": [tuple(item) for item in mols.controller.elements.ranges],
        "weights": full_weights(module),
    }


def _full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def reference(
    how: str, model: str, mode: str, alphas: Mapping[str, float]
) -> tuple[dict[str, GroupValues], dict[str, Tensor], Tensor | None]:
    """Statistics of the samples, the weights after UPDATES updates with these alphas, and the tokens of mode "moments".

    These are the tokens whose embedding had a gradient before the window's last step. None: a tied embedding.
    """
    module = tiny(model)
    mask = masks(model, module)
    optimizer = ElementwiseAdamW(module, mask, SETTINGS)
    samples: list[dict[str, Tensor]] = []
    truth: dict[str, GroupValues] = {}
    ended = START if mode == "probe" else START + SAMPLES
    t, iteration, before = 0, 0, None
    tied = "lm_head.weight" not in dict(module.named_parameters())
    while t < UPDATES:
        sample = (bf16_sample if how == "fsdp2 bf16" else gradient_sample)(module, iteration, DATA[how], MICROS)
        iteration += 1
        if t >= START and len(samples) < SAMPLES:
            samples.append(sample)
            if len(samples) == SAMPLES:
                seen = tokens_of(range(START, START + SAMPLES), DATA[how], MICROS, VOCABULARY)
                truth = group_values(samples, mask, seen)
            if mode == "probe":
                continue
        if t == START + SAMPLES - 1 and not tied:
            before = (optimizer.v[EMBEDDING] != 0).any(1)
        optimizer.step(sample, 1.0, multipliers(alphas, ramp(t, ended, RAMP_END, "linear")))
        assert optimizer.norm > CLIP, "clipping must act"
        t += 1
    return truth, {name: p.detach().clone() for name, p in module.named_parameters()}, before


def bf16_sample(module: nn.Module, iteration: int, ranks: int, micros: int) -> dict[str, Tensor]:
    """As `gradient_sample`, of a bf16 copy of the fp32 weights, whose gradients are summed in fp32 after each pass."""
    copied = cast_parameters(copy.deepcopy(module), torch.bfloat16)
    total = {name: torch.zeros(p.shape) for name, p in copied.named_parameters()}
    for micro in range(micros):
        for rank in range(ranks):
            copied.zero_grad()
            (loss_of(copied, batch(iteration, micro, rank)) / micros).backward()
            for name, parameter in copied.named_parameters():
                total[name] += parameter.grad.float() / ranks
    return total
