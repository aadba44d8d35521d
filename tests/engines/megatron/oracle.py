"""The single-process reference of a Megatron run: the real GPTModel, plain autograd, AdamW with a rate per element.

No DistributedDataParallel, no Megatron optimizer or scheduler and nothing of the product. Which rows of a fused
projection are query, key and value is found by autograd, every other group by plain names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_patches.cpu.emulation import cpu_megatron
from tests.engines.megatron.building import SEQUENCES, Setup, stage_model, start, tokens
from tests.engines.megatron.grids import REFERENCE, Plan, run
from tests.engines.megatron.model_config import DTYPES, transformer_config
from tests.engines.megatron.weights import fill
from tests.helpers.oracle.adamw import AdamSettings, ElementwiseAdamW, multipliers, ramp
from tests.helpers.oracle.histogram import histogram_median
from tests.helpers.oracle.models import GROUPS
from tests.helpers.oracle.moments import MomentValues, moment_values
from tests.helpers.oracle.statistics import GroupValues, alphas, group_values

ROW_GROUPS = ("qk", "qk", "vo", "vo")  # query, key, value, output gate: what get_query_key_value_tensors returns


class Truth(NamedTuple):
    """Results of the reference. weights: after all updates, by logical name; norms, multipliers: of each update."""

    values: Mapping[str, Any]  # GroupValues, MomentValues in mode "moments"
    alphas: dict[str, float]
    masks: dict[str, Tensor]
    initial: dict[str, Tensor]
    weights: dict[str, Tensor]
    norms: list[float]
    multipliers: list[dict[str, float]]


def plain(setup: Setup) -> Setup:
    """The same logical model and data without any parallelism."""
    return dataclasses.replace(
        setup,
        layers=setup.n_layers,
        **dict(
            tp=1,
            pp=1,
            vp=0,
            ep=1,
            etp=None,
            sp=False,
            distributed=True,
            instances=1,
            overlap=False,
            recompute="",
            dispatcher="alltoall",
        ),
    )


def build_reference(setup: Setup) -> tuple[nn.Module, nn.Module]:
    """(GPTModel, the module to call: the same, or Megatron's wrapper that casts it to 16 bits)."""
    from megatron.core.transformer.module import Float16Module

    config = transformer_config(setup)
    model = stage_model(setup, config, True, True)()
    outer = model if DTYPES[setup.dtype] is torch.float32 else Float16Module(config, model)
    fill([model], setup)
    return model, outer


# --- groups ---------------------------------------------------------------------------------------------------------


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Index into GROUPS of every element of every parameter, int64, in the parameter's shape."""
    masks = {name: torch.full(p.shape, GROUPS.index(_group(name))) for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if name.endswith("self_attention"):
            mask = masks[f"{name}.linear_qkv.weight"]
            mask.copy_(_rows_by_autograd(module)[:, None].expand_as(mask))
    return masks


def _rows_by_autograd(attention: Any) -> Tensor:
    """Group index of each row of linear_qkv's weight: which of the tensors the row moves."""
    weight = attention.linear_qkv.weight
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 1, attention.config.hidden_size, generator=generator).to(weight.dtype)
    gate = {"output_gate": True} if getattr(attention.config, "attention_output_gate", False) else {}
    outputs = attention.get_query_key_value_tensors(hidden, None, **gate)
    rows = torch.full((len(weight),), -1)
    for output, group in zip(outputs, ROW_GROUPS, strict=False):
        weights = torch.randn(output.shape, generator=generator).to(output.dtype)
        (gradient,) = torch.autograd.grad((output * weights).sum(), [weight], retain_graph=True)
        moved = gradient.abs().sum(1) > 0
        assert (rows[moved] == -1).all(), "a row moves one tensor only"
        rows[moved] = GROUPS.index(group)
    assert (rows >= 0).all(), "every row moves a tensor"
    return rows


def _group(name: str) -> str:
    if name.endswith("bias") or "norm" in name or "router" in name:
        return "other"
    if name.startswith("embedding."):
        return "embedding"
    if name == "output_layer.weight":
        return "head"
    if name.endswith("self_attention.linear_proj.weight"):
        return "vo"
    if ".mlp." in name and "linear_fc" in name:
        return "mlp"
    assert ".linear_qkv." in name, name
    return "qk"


# --- gradients and rates --------------------------------------------------------------------------------------------


def gradient(model: nn.Module, outer: nn.Module, setup: Setup, iteration: int) -> dict[str, Tensor]:
    """The fp32 gradient of the mean over the micro-batches' mean losses, before clipping."""
    total = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    positions = torch.arange(setup.seq)[None].expand(SEQUENCES, -1)
    masked = torch.triu(torch.ones(1, 1, setup.seq, setup.seq, dtype=torch.bool), 1)
    for number in range(setup.micro_batches):
        model.zero_grad()
        ids = tokens(setup, iteration, number)
        loss = outer(ids, positions, masked, labels=ids.roll(-1, 1)).float().mean()
        (loss / setup.micro_batches).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad.float()
    return total


def rate(setup: Setup, plan: Plan, update: int) -> float:
    """Base learning rate of a 0-based update: linear from 0, then half a cosine down to a tenth."""
    if update <= plan.warmup and plan.warmup:
        return setup.lr * update / plan.warmup
    x = (update - plan.warmup) / (plan.updates - plan.warmup)
    lowest = setup.lr / 10
    return lowest + (setup.lr - lowest) * (1 + math.cos(math.pi * min(x, 1.0))) / 2


def estimate(values: GroupValues | MomentValues, plan: Plan) -> float:
    """The estimate that alphas are made of; the median is that of the documented histogram."""
    if plan.estimator != "median" or isinstance(values, MomentValues):
        return values.estimate(plan.estimator, plan.corrected)
    assert not plan.corrected
    return histogram_median(values.snr)


class _Rates:
    """Alphas from the statistics, and the multipliers of each update."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.alphas, self.since = plan, dict[str, float](), 0

    def measured(self, values: Mapping[str, GroupValues | MomentValues], update: int) -> None:
        plan = self.plan
        found = {group: estimate(v, plan) for group, v in values.items()}
        steps = plan.estimator in ("damping", "step_rms")
        self.alphas = alphas(found, REFERENCE, steps=steps, low=plan.low, high=plan.high)
        self.since = update

    def of(self, update: int) -> dict[str, float]:
        if not self.alphas:
            return {}
        rates = multipliers(self.alphas, ramp(update, self.since, self.plan.ramp_end, "linear"))
        return rates | {"vo": rates["vo"] * self.plan.tilt}


# --- the run --------------------------------------------------------------------------------------------------------


def work(kind: str, setup: Setup, plan: Plan) -> Any:
    """On one rank: the reference, or the product on a grid of one rank."""
    return reference(setup, plan) if kind == "reference" else run(setup, plan)


def reference(setup: Setup, plan: Plan) -> Truth:
    """The reference's run of `plan`. In 16 bits it has no fp32 masters, so it measures at the initial weights alone."""
    half = setup.dtype != "float32"
    assert not half or plan.start == 0
    with cpu_megatron():
        start(setup)
        model, outer = build_reference(setup)
        masks = masks_of(model)
        settings = AdamSettings(
            lr=setup.lr,
            eps=plan.eps,
            weight_decay=setup.weight_decay,
            clip=setup.clip,
            scaled_decay=plan.decay == "scaled",
        )
        initial = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        adam, rates = ElementwiseAdamW(model, masks, settings), _Rates(plan)
        samples: list[dict[str, Tensor]] = []
        values: Mapping[str, GroupValues | MomentValues] = {}
        norms, applied = [], []
        for iteration in range(plan.samples if half else plan.passes):
            sample = gradient(model, outer, setup, iteration)
            measured = plan.measures(iteration)
            # Mode "moments": the tokens whose row of an untied embedding ever had a gradient before the last step.
            before = None
            if "output_layer.weight" in adam.v:
                before = (adam.v["embedding.word_embeddings.weight"] != 0).any(1)
            if measured:
                samples.append(sample)
            if not (measured and plan.mode == "probe"):
                update = adam.steps
                applied.append(rates.of(update))
                adam.step(sample, rate(setup, plan, update) / setup.lr, applied[-1])
                norms.append(adam.norm)
            if len(samples) == plan.samples and not values:
                occurred = _tokens(setup, range(iteration + 1 - plan.samples, iteration + 1), model)
                values = _moments(adam, before) if plan.mode == "moments" else group_values(samples, masks, occurred)
                rates.measured(values, adam.steps)
        weights = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        return Truth(values, rates.alphas, masks, initial, weights, norms, applied)


def _tokens(setup: Setup, iterations: Iterable[int], model: nn.Module) -> Tensor:
    """Which rows of the embedding, padding included, are tokens of these iterations."""
    seen = torch.zeros(len(model.get_parameter("embedding.word_embeddings.weight")), dtype=torch.bool)
    for iteration in iterations:
        for number in range(setup.micro_batches):
            seen[tokens(setup, iteration, number).unique()] = True
    return seen


def _moments(adam: ElementwiseAdamW, occurred: Tensor | None) -> dict[str, MomentValues]:
    """Statistics from Adam's current m and v. occurred: tokens that occurred, if they are known."""
    moments = {name: (adam.m[name], adam.v[name]) for name in adam.masks}
    return moment_values(moments, adam.masks, adam.steps, (adam.settings.beta1, adam.settings.beta2), occurred)
