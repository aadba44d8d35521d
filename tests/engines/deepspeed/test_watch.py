"""SNR curves from Adam's moments on every ZeRO stage against the formula on whole tensors; reading changes nothing."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.engines.deepspeed.support import CLIP, STAGES, config, engine_of, fingerprint, iterate
from tests.helpers.harness import Results, run_cases
from tests.helpers.oracle.adamw import AdamSettings
from tests.helpers.oracle.models import GROUPS, build, masks
from tests.helpers.oracle.statistics import gradient_sample

WORLD, STEPS, EVERY, MICROS = 2, 6, 2, 1
SETTINGS = AdamSettings(lr=1e-3, eps=1e-5, weight_decay=0.0, vector_lr_factor=1.0, clip=CLIP)
RTOL = 1e-4  # v - m^2 cancels in so few steps, which magnifies the 1e-7 by which fp32 gradients differ


def watch(model: str, stage: int) -> dict[str, Any]:
    """On each rank: a run that is read every EVERY updates, and the same one that is not."""
    from mols_ds.engines.deepspeed.snr_monitor import SnrWatch

    reader, prints = SnrWatch(EVERY), []
    for read in (True, False):
        engine = engine_of(model, SETTINGS, config(stage, micros=MICROS))
        for step in range(STEPS):
            iterate(engine, step, MICROS)
            if read:
                reader(engine)
        prints.append(fingerprint(engine))
        engine.destroy()
    return {"steps": reader.steps, "curves": reader.curves, "snr": reader.as_snr(), "same": prints[0] == prints[1]}


def refuse(stage: int) -> str:
    """On each rank: what a reader says about an optimizer without Adam's moments."""
    import mols_ds
    from mols_ds.engines.deepspeed.snr_monitor import SnrWatch
    from mols_ds.errors import MolsUnsupportedError

    model = build("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine = mols_ds.initialize(model=model, optimizer=optimizer, config=config(stage, micros=MICROS))[0]
    iterate(engine, 0, MICROS)
    try:
        SnrWatch(1)(engine)
    except MolsUnsupportedError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


@functools.cache
def results() -> Results:
    return run_cases(watch, WORLD, [(model, stage) for model in ("llama", "gpt2") for stage in STAGES], timeout=120)


@functools.cache
def oracle(model_name: str) -> dict[str, list[float]]:
    """Corrected "pooled" of every group at each reading: (sum mu^2 - c sum s^2) / sum s^2 of whole tensors, float64."""
    model = build(model_name)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=SETTINGS.lr, betas=(SETTINGS.beta1, SETTINGS.beta2), eps=SETTINGS.eps, weight_decay=0.0
    )
    curves: dict[str, list[float]] = {}
    for step in range(STEPS):
        for name, gradient in gradient_sample(model, step, WORLD, MICROS).items():
            model.get_parameter(name).grad = gradient
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if (step + 1) % EVERY:
            continue
        t, b1, b2 = step + 1, SETTINGS.beta1, SETTINGS.beta2
        c = sum(((1 - b1) * b1**k / (1 - b1**t)) ** 2 for k in range(t))
        for index, group in enumerate(GROUPS):
            signal = noise = 0.0
            for name, mask in masks(model_name, model).items():
                state = optimizer.state[model.get_parameter(name)]
                m = state["exp_avg"][mask == index].double() / (1 - b1**t)
                v = state["exp_avg_sq"][mask == index].double() / (1 - b2**t)
                s2 = ((v - m * m) / (1 - c)).clamp(min=0)
                counted = s2 > 0
                signal += float((m * m - c * s2)[counted].sum())
                noise += float(s2[counted].sum())
            if noise:
                curves.setdefault(group, []).append(signal / noise)
    return curves


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_curves_equal_the_formula_and_reading_changes_nothing(model: str, stage: int) -> None:
    ranks = results()[model, stage]
    for found in ranks:
        assert found["same"] and found["steps"] == [2, 4, 6]
        assert found["curves"] == ranks[0]["curves"], "the same numbers on every rank"
    for group, expected in oracle(model).items():
        assert ranks[0]["curves"]["pooled"][group] == pytest.approx(expected, rel=RTOL, abs=1e-6), group
        assert all(value > 0 for value in ranks[0]["snr"][group])


def test_an_optimizer_without_adams_moments_is_refused_by_name() -> None:
    for said in run_cases(refuse, WORLD, [(1,)], timeout=60)[(1,)]:
        assert "SGD keeps no exp_avg and exp_avg_sq" in said
