"""A parameter that a batch does not use counts as 0 in that sample, on every stage; a dynamic loss scale that is too
high comes down in a probe window, as stock's does."""

from __future__ import annotations

import copy
import functools
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

import mols_ds
from tests.engines.deepspeed.engines import OFFLOAD, config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.models import PlainLM
from tests.engines.deepspeed.state import full_weights
from tests.helpers.digests import caught
from tests.helpers.harness import Results, run_cases
from tests.helpers.oracle.models import batch

pytestmark = pytest.mark.distributed

WORLD, SAMPLES, START, MICROS = 2, 8, 2, 2
NAMES = ("up_proj.weight", "up_proj.bias", "down_proj.weight", "q_proj.weight")
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    **{f"{stage} {mode}": (stage, mode, {}) for stage in range(4) for mode in ("probe", "online")},
    **{f"{stage} {mode} offload": (stage, mode, OFFLOAD) for stage in (1, 2, 3) for mode in ("probe", "online")},
}
FROZEN = [f"{name} frozen" for name in CASES]
"""The same, with parameters that are frozen when the first sample is taken, instead of unused ones."""


class Skipping(PlainLM):
    """Leaves its MLP out where `skip` is set."""

    skip = False

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        if not self.skip:
            return super().forward(input_ids, labels)
        logits = self.lm_head(self.norm(self.q_proj(self.embed_tokens(input_ids))))[:, :-1].reshape(-1, 97)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:].reshape(-1))
        return type("Output", (), {"loss": loss})


def expected(plain: Skipping, iteration: int, used: bool) -> dict[str, torch.Tensor]:
    """The mean gradient of a global batch by torch alone, flat."""
    plain.skip = not used
    plain.zero_grad()
    for micro in range(MICROS):
        for rank in range(WORLD):
            inputs = batch(iteration, micro, rank)
            (plain(inputs, inputs).loss / (MICROS * WORLD)).backward()
    return {n: torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for n, p in plain.named_parameters()}


def statistics(name: str) -> dict[str, float]:
    """Largest error of mean and M2 against torch, relative to the largest value, of this rank's elements."""
    stage, mode, zero = CASES[name.removesuffix(" frozen")]
    frozen = name.endswith(" frozen")
    torch.manual_seed(0)
    model = Skipping()
    plain = copy.deepcopy(model)
    section = {"mode": mode, "start": START, "ramp_end": 40, "samples": SAMPLES, "noise_floor_correction": False}
    settings = config(stage, section, zero=zero, micros=MICROS)
    engine = engine_of(settings, model, torch.optim.SGD(list(model.parameters()), lr=1e-9))
    elements, kept, oracle = engine.mols.controller.elements, {}, []
    free = elements.free

    def keep() -> None:
        if elements.accumulators is not None and not kept:
            kept.update(mean=elements.accumulators.mean.clone(), m2=elements.accumulators.m2.clone())
        free()

    elements.free = keep
    for iteration in range(START + SAMPLES):
        # The first sample does not use what the last step used.
        used = frozen or iteration < START or iteration % 2 == 1
        engine.module.skip = not used
        if frozen and iteration == START:
            for part in NAMES:
                engine.module.get_parameter(part).requires_grad_(False)
                plain.get_parameter(part).requires_grad_(False)
        iterate(engine, iteration, MICROS)
        if iteration >= START:
            oracle.append(expected(plain, iteration, used))
    errors = {}
    for key in ("mean", "m2"):
        worst = 0.0
        for item in elements.ranges:
            if item.name in NAMES:
                samples = torch.stack([one[item.name] for one in oracle]).double()
                mean = samples.mean(0)
                true = mean if key == "mean" else ((samples - mean) ** 2).sum(0)
                seen = kept[key][item.offset : item.offset + item.numel]
                error = (seen - true[item.start : item.start + item.numel]).abs().max() / true.abs().max().clamp(
                    min=1e-9
                )
                worst = max(worst, float(error))
        errors[key] = worst
    engine.destroy()
    return errors


@functools.cache
def runs() -> Results:
    return run_cases(statistics, WORLD, [(name,) for name in (*CASES, *FROZEN)], timeout=60)


@pytest.mark.parametrize("name", [*CASES, *FROZEN])
def test_a_parameter_without_a_gradient_counts_as_zero(name: str) -> None:
    for errors in runs()[name,]:
        assert errors["mean"] < 1e-4 and errors["m2"] < 1e-4, errors


def moments_alphas(stage: int) -> dict[str, float]:
    """Alphas of mode "moments" where two of three batches leave the MLP out."""
    torch.manual_seed(0)
    model = Skipping()
    section = {"mode": "moments", "start": 0, "samples": 6, "ramp_end": 20, "rules": [["norm", "other"]]}
    engine = engine_of(config(stage, section), model, torch.optim.AdamW(list(model.parameters()), lr=1e-9))
    for iteration in range(8):
        engine.module.skip = iteration % 3 != 2
        iterate(engine, iteration, MICROS)
    alphas: dict[str, float] = engine.mols.alphas
    engine.destroy()
    return alphas


def test_mode_moments_reads_the_same_on_every_stage() -> None:
    found = run_cases(moments_alphas, WORLD, [(stage,) for stage in (1, 2, 3)], timeout=60)
    wanted = found[1,][0]
    assert wanted and wanted["mlp"] != 1.0
    for stage in (2, 3):
        assert found[stage,][0] == pytest.approx(wanted, rel=1e-3)


def overflow(stage: int) -> dict[str, Any]:
    """A window that begins with a loss scale at which every gradient overflows."""
    section = {"start": 0, "ramp_end": 40, "samples": 4, "noise_floor_correction": False}
    settings = config(stage, section, precision="fp16", micros=1)
    settings["fp16"] = {"enabled": True, "initial_scale_power": 36, "hysteresis": 2}
    torch.manual_seed(0)
    model = PlainLM()
    engine = engine_of(settings, model, torch.optim.SGD(list(model.parameters()), lr=0.0))
    iterations = 0
    while engine.mols.phase == "calibrating" and iterations < 60:
        iterate(engine, iterations, 1)
        iterations += 1
    report = engine.mols.report()
    result = {"failed": report.get("failed"), "samples": engine.mols.samples, "iterations": iterations}
    scale = {
        "scale": float(engine.optimizer.loss_scale_config.cur_scale if stage == 0 else engine.optimizer.loss_scale)
    }
    engine.destroy()
    return {**result, **scale, "rank": dist.get_rank()}


@functools.cache
def overflows() -> Results:
    return run_cases(overflow, WORLD, [(stage,) for stage in (0, 2, 3)], timeout=60)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_loss_scale_that_is_too_high_comes_down_in_the_window(stage: int) -> None:
    for seen in overflows()[stage,]:
        assert seen["failed"] is None and seen["samples"] == 4
        assert 1.0 < seen["scale"] < 2.0**36 and seen["iterations"] > 4


def test_stage_0_measures_all_samples() -> None:
    assert [seen["failed"] for seen in overflows()[0,]] == [None, None]


def frozen_at_attach(stage: int) -> tuple[list[str], bool, bool, list[str]]:
    """`lm_head` is frozen after the engine was made and before MoLS is attached: groups, what one step moves, and what
    is said when it trains again."""
    torch.manual_seed(0)
    model = PlainLM()
    optimizer = torch.optim.SGD(list(model.parameters()), lr=0.1)
    engine = engine_of(config(stage, micros=1), model, optimizer, initialize=deepspeed.initialize)
    model.lm_head.weight.requires_grad_(False)
    mols_ds.attach(engine, {"fixed_alphas": {"qk": 0.5}, "start": 0, "ramp_end": 0})
    before = full_weights(engine)
    iterate(engine, 0, 1)
    after, groups = full_weights(engine), list(engine.mols.controller.groups)
    model.lm_head.weight.requires_grad_(True)
    with caught() as said:
        iterate(engine, 1, 1)
        iterate(engine, 2, 1)
    engine.destroy()
    moved = [not torch.equal(before[name], after[name]) for name in ("lm_head.weight", "q_proj.weight")]
    return groups, moved[0], moved[1], said


@pytest.mark.parametrize("stage", range(4))
def test_weights_frozen_before_attach_are_left_out(stage: int) -> None:
    """A KeyError at stages 1 to 3, whose shards hold them; and they train at the base rate when they are unfrozen."""
    for groups, head, qk, said in run_cases(frozen_at_attach, WORLD, [(stage,)], timeout=60)[stage,]:
        assert "head" not in groups and not head and qk
        (line,) = said
        assert line.startswith("1 weights train that were frozen") and "lm_head.weight" in line
