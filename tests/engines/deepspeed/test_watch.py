"""SNR curves from Adam's moments on every ZeRO stage against the formula on whole tensors; reading changes nothing."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.engines.deepspeed.engines import CLIP, STAGES, config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.state import snapshot
from tests.helpers.harness import Results, run_cases
from tests.helpers.oracle.adamw import AdamSettings
from tests.helpers.oracle.models import build, masks
from tests.helpers.oracle.moments import MomentValues, moment_values
from tests.helpers.oracle.statistics import ESTIMATORS, gradient_sample
from tests.helpers.tiers import Cases

WORLD, STEPS, EVERY, MICROS = 2, 6, 2, 1
SETTINGS = AdamSettings(lr=1e-3, eps=1e-5, weight_decay=0.0, vector_lr_factor=1.0, clip=CLIP)
NARROW = 0.05  # of an interval, relative; up to 0.006 here: after two steps, some elements are at the cut


def watch(model: str, stage: int) -> dict[str, Any]:
    """On each rank: a run that is read every EVERY updates, and the same one that is not."""
    from mols_ds.engines.deepspeed.snr_monitor import SnrWatch

    reader, prints = SnrWatch(EVERY), []
    for read in (True, False):
        engine = engine_of(config(stage, micros=MICROS), model, SETTINGS)
        for step in range(STEPS):
            iterate(engine, step, MICROS)
            if read:
                reader(engine)
        prints.append(snapshot(engine))
        engine.destroy()
    return {"steps": reader.steps, "curves": reader.curves, "snr": reader.as_snr(), "same": prints[0] == prints[1]}


def refuse(stage: int) -> str:
    """On each rank: message of a reader about an optimizer without Adam's moments."""
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


CASES = Cases([(model, stage) for model in ("llama", "gpt2") for stage in STAGES], quick=[("llama", 2), ("gpt2", 3)])


@functools.cache
def results() -> Results:
    return run_cases(watch, WORLD, CASES.wanted, timeout=120)


@functools.cache
def oracle(model_name: str) -> list[dict[str, MomentValues]]:
    """SNR from whole tensors' moments at each reading, by group."""
    model = build(model_name)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=SETTINGS.lr, betas=(SETTINGS.beta1, SETTINGS.beta2), eps=SETTINGS.eps, weight_decay=0.0
    )
    readings = []
    for step in range(1, STEPS + 1):
        for name, gradient in gradient_sample(model, step - 1, WORLD, MICROS).items():
            model.get_parameter(name).grad = gradient
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if step % EVERY == 0:
            states = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
            moments = {name: (state["exp_avg"], state["exp_avg_sq"]) for name, state in states.items()}
            betas = (SETTINGS.beta1, SETTINGS.beta2)
            readings.append(moment_values(moments, masks(model_name, model), step, betas))
    return readings


@CASES.parametrize(("model", "stage"))
def test_curves_equal_the_formula_and_reading_changes_nothing(model: str, stage: int) -> None:
    ranks = results()[model, stage]
    for found in ranks:
        assert found["same"] and found["steps"] == [2, 4, 6]
        assert found["curves"] == ranks[0]["curves"], "the same numbers on every rank"
    for number, values in enumerate(oracle(model)):
        for group, expected in values.items():
            for estimator in ESTIMATORS:
                low, high = expected.bounds(estimator, False)
                assert high - low <= NARROW * low, (group, estimator, low, high)
                low, high = expected.bounds(estimator, True)
                assert low <= ranks[0]["curves"][estimator][group][number] <= high, (group, estimator)
            assert ranks[0]["snr"][group][number] > 0


@pytest.mark.tier("all")
def test_an_optimizer_without_adams_moments_is_refused_by_name() -> None:
    for said in run_cases(refuse, WORLD, [(1,)], timeout=60)[(1,)]:
        assert "SGD has no exp_avg and exp_avg_sq" in said
