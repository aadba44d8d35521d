"""Optimizers by name on the real engine: each alone, and each with a rate per module against a library's own object.

Two ranks, gradients of both averaged. The reference has one process and whole tensors (helpers/oracle/optimizers.py).
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mols_ds.engines.deepspeed.shards import find_shards
from mols_ds.optim.catalog import OPTIMIZERS
from tests.engines.deepspeed.engines import config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.models import model_of
from tests.engines.deepspeed.state import NOT_SAVED, full_weights, inner_optimizer, snapshot
from tests.helpers.digests import caught, differing
from tests.helpers.harness import Results, run_cases
from tests.helpers.oracle.models import GROUPS, masks
from tests.helpers.oracle.optimizers import BETAS, DECAY, EPS, GAP, LIBRARY, LR, RANK, by_element, halves, rates_of
from tests.helpers.oracle.sizes import VOCABULARY
from tests.helpers.oracle.statistics import GroupValues, gradient_sample, group_values, tokens_of
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

WORLD, STEPS, ALONE_STEPS = 2, 5, 50
ALPHAS = {"embedding": 3.0, "head": 2.0, "qk": 0.5, "vo": 1.0, "mlp": 1.5}
SHARDED = (1, 2, 3)
BLOCK = 256  # of bitsandbytes' 8-bit state

ADAM = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
PARAMS: dict[str, dict[str, Any]] = {name: settings for name, (settings, _) in LIBRARY.items()}
PARAMS |= {
    "AdamMini": ADAM,
    "SGG": {**ADAM, "interval": 2},
    "APOLLO": {**ADAM, "rank": RANK, "update_proj_gap": GAP},
    "Adam8bit": {**ADAM, "min_8bit_size": BLOCK},
}
RATES = Cases(
    [
        *((name, model, 0) for name in ("NAdam", "Lion", "Lamb") for model in ("gpt2",)),
        *((name, "gpt2" if stage == 2 else "llama", stage) for name in ("NAdam", "Lion", "Lamb") for stage in SHARDED),
        *((name, "gpt2" if stage == 2 else "llama", stage) for name in ("AdamMini", "SGG") for stage in SHARDED),
        *((name, "gpt2", 0) for name in ("Muon", "SOAP", "Adafactor", "GaLore", "APOLLO")),
    ],
    quick=[("Lion", "gpt2", 2), ("AdamMini", "llama", 3), ("SOAP", "gpt2", 0)],
    full=lambda case: case[2] == 1,  # the class of stage 2
)
# Largest difference of a weight after five steps, which move it by up to 5 x 3 LR = 3e-2 (Lion: a quarter).
# Measured: 6e-7, float32 rounding and the order of sums over ranks.
ATOL = 2e-6
SIGN_FLIPS = 4  # elements of 3.7e4 whose gradient is float noise, of which Lion takes the sign. Measured: 1
# Muon's Newton-Schulz iteration runs in bf16 (a rounding is 4e-3) and blows up small singular values: its weights are
# compared by norm, relative to how far they moved. A rate wrong by a tenth would be 1e-1. Measured: 1.04e-2.
MUON_RTOL = 3e-2
RTOL = 1e-5  # of a statistic: as in test_statistics.py
SAMPLES = 4


def engine_with(name: str, model: nn.Module, stage: int, mols: dict[str, Any] | None, **more: Any) -> Any:
    """An engine of the table's optimizer, built from the config alone."""
    more = {"optimizer": {"type": name, "source": "library", "params": PARAMS.get(name, {})}, **more}
    return engine_of(config(stage, mols, micros=1, **more), model, model_parameters=None)


def fixed(model: str) -> dict[str, Any]:
    alphas = {group: alpha for group, alpha in ALPHAS.items() if group != "head" or model == "llama"}
    return {"fixed_alphas": alphas, "start": 0, "ramp_end": 0}


# ---------------------------------------------------------------------- each alone

FAST = {"Lion": 1e-3, "Lamb": 1e-2, "GaLore": 1e-2, "Muon": 1e-2, "SGDSaI": 1e-2, "SOAP": 3e-3, "Adafactor": 1e-2}


def train_alone(name: str, precision: str) -> dict[str, Any]:
    """ALONE_STEPS steps over four batches, as a user's config that gives the rate alone would."""
    optimizer = {"type": name, "source": "library", "params": {"lr": FAST.get(name, 3e-3)}}
    if precision == "bf16":  # what DeepSpeed's constructor does to a fresh optimizer shows in the decay
        optimizer["params"]["weight_decay"] = 0.1
    engine = engine_with(
        name, model_of("llama"), 0, None, optimizer=optimizer, precision=precision, gradient_clipping=1.0
    )
    inner = inner_optimizer(engine)
    fresh = not inner.state and all("step" not in group for group in inner.param_groups)
    if precision == "bf16":
        pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        fresh &= all(torch.equal(low.float(), high) for g, h in pairs for low, high in zip(g, h, strict=True))
    losses = [iterate(engine, step % 4, 1) for step in range(ALONE_STEPS)]
    shapes = {p.ndim for group in inner.param_groups for p in group["params"]}
    engine.destroy()
    return {"losses": losses, "fresh": fresh, "class": type(inner).__name__, "matrices": 2 in shapes}


ALONE = Cases(
    [
        *((name, "fp32") for name in OPTIMIZERS),
        *((name, "bf16") for name in ("SOAP", "GaLore", "SGDSaI", "Muon", "Adam8bit", "Lamb")),
    ],
    quick=[("Lion", "fp32"), ("AdamMini", "fp32"), ("Adam8bit", "bf16")],
)


@functools.cache
def alone() -> Results:
    return run_cases(train_alone, 1, ALONE.wanted, timeout=60)


@ALONE.parametrize(("name", "precision"))
def test_each_alone_trains(name: str, precision: str) -> None:
    """The mean loss of the last four steps (one of each batch) is at most two thirds of the first four's."""
    seen = alone()[name, precision][0]
    first, last = sum(seen["losses"][:4]) / 4, sum(seen["losses"][-4:]) / 4
    assert seen["class"] == OPTIMIZERS[name].load().__name__  # type: ignore[attr-defined]
    assert seen["matrices"] and seen["fresh"], "whole tensors, and no step before the first"
    assert last < first * 2 / 3, (first, last)


# ---------------------------------------------------------------------- with a rate per module


def train_with_rates(name: str, model: str, stage: int) -> dict[str, Any]:
    """Without clipping. The bases are computed in the first step, whose gradients equal the reference's bit for bit."""
    engine = engine_with(name, model_of(model), stage, fixed(model), gradient_clipping=0.0)
    for step in range(STEPS):
        iterate(engine, step, 1)
    seen = {"weights": full_weights(engine), "multipliers": engine.mols.multipliers}
    engine.destroy()
    return seen


def reference_of(name: str, model: nn.Module, mask: dict[str, Tensor]) -> torch.optim.Optimizer:
    """The library's optimizer over whole tensors; this package's classes where no library has the optimizer."""
    matrices, rest = halves(model, mask)
    if name in LIBRARY:
        return LIBRARY[name][1](matrices, rest)
    factory, settings = OPTIMIZERS[name].load(), dict(PARAMS[name])
    if name == "APOLLO":
        low = {"rank": settings.pop("rank"), "update_proj_gap": settings.pop("update_proj_gap")}
        return factory(
            [{"params": matrices, **low, "scale": 1.0, "scale_type": "channel"}, {"params": rest}], **settings
        )
    optimizer = factory(matrices + rest, **settings)
    optimizer.bind_model(model)  # type: ignore[attr-defined]
    return optimizer


@functools.cache
def reference_weights(name: str, model: str) -> dict[str, Tensor]:
    reference = model_of(model)
    mask = masks(model, reference)
    optimizer, rates = reference_of(name, reference, mask), rates_of(reference, mask, fixed(model)["fixed_alphas"])
    for step in range(STEPS):
        gradients = gradient_sample(reference, step, WORLD, 1)
        for key, p in reference.named_parameters():
            p.grad = gradients[key].clone()
        by_element(optimizer, rates)
    return {key: p.detach().clone() for key, p in reference.named_parameters()}


@functools.cache
def with_rates() -> Results:
    return run_cases(train_with_rates, WORLD, RATES.wanted, timeout=60)


@RATES.parametrize(("name", "model", "stage"))
def test_rates_are_those_of_every_element(name: str, model: str, stage: int) -> None:
    truth = reference_weights(name, model)
    start = {key: p.detach() for key, p in model_of(model).named_parameters()}
    for seen in with_rates()[name, model, stage]:
        assert seen["multipliers"]["qk"] == ALPHAS["qk"]
        weights = seen["weights"]
        if name == "Muon":
            for key, w in truth.items():
                assert float((weights[key] - w).norm()) <= MUON_RTOL * float((start[key] - w).norm()), key
            continue
        errors = torch.cat([(weights[key] - w).abs().flatten() for key, w in truth.items()])
        wrong = int((errors > ATOL).sum())
        assert wrong <= (SIGN_FLIPS if name == "Lion" else 0), (wrong, float(errors.max()))
        assert max(float((start[key] - w).abs().max()) for key, w in truth.items()) > 1000 * ATOL


# ---------------------------------------------------------------------- 8-bit Adam


def train_eight_bit(model: str, stage: int) -> dict[str, Any]:
    """Beside the engine, bitsandbytes' own optimizer on copies of the same flat shards, given the same gradients.

    Its blocks of 256 elements cross the borders of parameters there, so whole tensors are no reference.
    """
    from bitsandbytes.optim import AdamW8bit

    engine = engine_with("Adam8bit", model_of(model), stage, fixed(model))
    shards, mask = find_shards(engine), masks(model, model_of(model))
    copies = [nn.Parameter(tensor.detach().clone()) for tensor in shards.tensors]
    values = torch.tensor([fixed(model)["fixed_alphas"].get(group, 1.0) for group in GROUPS])
    rates = {id(copy): torch.ones_like(copy.detach()) for copy in copies}
    for copy, pieces in zip(copies, shards.ranges, strict=True):
        for name, start, offset, numel in pieces:
            rates[id(copy)][offset : offset + numel] = values[mask[name].flatten()[start : start + numel]]
    numbers = {id(tensor): i for i, tensor in enumerate(shards.tensors)}

    def take_gradients(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                copies[numbers[id(tensor)]].grad = tensor.grad.clone()

    shards.inner.register_step_pre_hook(take_gradients)
    reference = AdamW8bit(copies, **PARAMS["Adam8bit"])
    for step in range(STEPS):
        iterate(engine, step, 1)
        by_element(reference, rates)
    error = bits = crossing = 0.0
    for tensor, copy, pieces in zip(shards.tensors, copies, shards.ranges, strict=True):
        bits = max(bits, 8.0 * shards.inner.state[tensor]["state1"].element_size()) if tensor.numel() >= BLOCK else bits
        for _, _, offset, numel in pieces:
            where = slice(offset, offset + numel)
            error = max(error, float((tensor.detach() - copy.detach())[where].abs().max()))
            crossing += offset % BLOCK != 0
    engine.destroy()
    return {"error": error, "bits": bits, "crossing": crossing}


EIGHT_BIT = Cases(SHARDED, full=[1])


@functools.cache
def eight_bit() -> Results:
    return run_cases(train_eight_bit, WORLD, [("gpt2", stage) for stage in EIGHT_BIT.wanted], timeout=60)


@EIGHT_BIT.parametrize("stage")
def test_eight_bit_adam_with_rates(stage: int) -> None:
    for seen in eight_bit()["gpt2", stage]:
        assert seen["bits"] == 8 and seen["crossing"] > 0
        assert seen["error"] <= ATOL


# ---------------------------------------------------------------------- calibration and checkpoints

PROBED = Cases(
    [(name, stage) for name in ("Adam8bit", "AdamMini", "Lion", "Lamb", "LoRA") for stage in SHARDED],
    quick=[("AdamMini", 3), ("LoRA", 2)],
    full=lambda case: case[1] == 1 or case in (("Lion", 3), ("Lamb", 3)),
)


def lora() -> nn.Module:
    """The tiny LLaMA with adapters, drawn at random: as peft makes them, the gradient of lora_A is zero at first."""
    from peft import LoraConfig, get_peft_model

    base = model_of("llama")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    adapters = LoraConfig(r=4, target_modules=targets, lora_dropout=0.0, init_lora_weights=False)
    return get_peft_model(base, adapters)  # type: ignore[no-any-return]


def lora_masks(model: nn.Module) -> dict[str, Tensor]:
    groups = {"q_proj": "qk", "k_proj": "qk", "v_proj": "vo", "o_proj": "vo", "up_proj": "mlp", "down_proj": "mlp"}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {n: torch.full(p.shape, GROUPS.index(groups[n.split(".")[-4]])) for n, p in trained.items()}


def probe_engine(name: str, stage: int) -> Any:
    mols = {"start": 0, "samples": SAMPLES, "ramp_end": 6, "mode": "probe", "estimator": "damping"}
    if name == "LoRA":
        optimizer = {"type": "AdamW", "source": "library", "params": ADAM}
        return engine_with(name, lora(), stage, mols, optimizer=optimizer)
    return engine_with(name, model_of("llama"), stage, mols)


def probe_and_resume(name: str, stage: int) -> dict[str, Any]:
    """A calibration, two steps, a checkpoint, two more steps; then those two again from the checkpoint."""
    engine = probe_engine(name, stage)
    for iteration in range(SAMPLES):
        iterate(engine, iteration, 1)
    seen: dict[str, Any] = {"rows": engine.mols.report()["groups"], "phase": engine.mols.phase}
    seen["alphas"] = {group: alpha.hex() for group, alpha in engine.mols.alphas.items()}
    traces: list[dict[str, Any]] = []
    for resumed in (False, True):
        if resumed:
            engine.destroy()
            engine = probe_engine(name, stage)
            with caught() as warned:
                engine.load_checkpoint(f"{name}-{stage}", tag="t")
            seen["warned"] = warned
        else:
            for iteration in range(2):
                iterate(engine, SAMPLES + iteration, 1)
            engine.save_checkpoint(f"{name}-{stage}", tag="t")
        for iteration in range(2):
            iterate(engine, SAMPLES + 2 + iteration, 1)
        found = snapshot(engine) | {"alphas": repr(engine.mols.alphas), "phase": engine.mols.phase}
        traces.append(found)
    seen["differing"] = differing(*traces, "random", *NOT_SAVED)  # nothing here draws numbers
    engine.destroy()
    return seen


@functools.cache
def probed() -> Results:
    return run_cases(probe_and_resume, WORLD, PROBED.wanted, timeout=60)


@functools.cache
def statistics_of(model: str) -> dict[str, GroupValues]:
    """Of the initial weights: a probe that starts at once measures them for any optimizer."""
    reference = lora() if model == "LoRA" else model_of("llama")
    mask = lora_masks(reference) if model == "LoRA" else masks("llama", reference)
    samples = [gradient_sample(reference, i, WORLD, 1) for i in range(SAMPLES)]
    return group_values(samples, mask, tokens_of(range(SAMPLES), WORLD, 1, VOCABULARY))


@PROBED.parametrize(("name", "stage"))
def test_calibration_equals_the_oracle_and_resumes(name: str, stage: int) -> None:
    truth = statistics_of("LoRA" if name == "LoRA" else "llama")
    ranks = probed()[name, stage]
    for seen in ranks:
        assert seen["phase"] == "ramping" and seen["rows"].keys() == truth.keys()
        for group, values in truth.items():
            row = seen["rows"][group]
            assert row["elements"] == values.elements
            for estimator, key in (("mean", "snr_mean"), ("pooled", "snr_pooled"), ("damping", "damping")):
                assert row[key] == pytest.approx(values.estimate(estimator, corrected=False), rel=RTOL), (group, key)
        assert seen["alphas"] == ranks[0]["alphas"] and len(set(seen["alphas"].values())) > 1
        assert seen["differing"] == [] and seen["warned"] == []
