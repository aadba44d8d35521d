"""Results of studies that were never run, with losses known by construction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mols_ds.apps.study.runs import Chosen, StudyResults, StudyRun

RATES = (1e-3, 2e-3, 4e-3)
STEPS, TOKENS_PER_STEP = 10, 100
SEED_EFFECT = {0: 0.0, 1: 0.02, 2: -0.01, 3: 0.03, 4: 0.0, 5: -0.04}
NOISE = {0: 0.0, 1: 0.004, 2: -0.002, 3: 0.001, 4: -0.003, 5: 0.0}
"""What an arm's loss at a seed differs by from the sum of arm and seed: signs alternate from arm to arm."""


def result(model: str, arm: str, rate: float, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    """One run that ends at `loss` (infinite: diverged half-way), by a straight line from loss + 3 at step 1."""
    steps = range(1, STEPS + 1)
    ends = math.isfinite(loss)
    curve = [loss + 3 * (STEPS - step) / (STEPS - 1) for step in steps] if ends else [7.0] * (STEPS // 2)
    content = {
        "schema": 1,
        "model": model,
        "arm": arm,
        "values": {"lr": rate},
        "seed": seed,
        "steps": STEPS,
        "tokens": STEPS * TOKENS_PER_STEP,
        "tokens_per_step": TOKENS_PER_STEP,
        "probe_passes": 0,
        "weights": 1000,
        "groups": {},
        "val_loss": loss if ends else None,
        "curve": {"step": [], "tokens": [], "loss": []},
        "val_curve": {
            "step": list(steps)[: len(curve)],
            "tokens": [step * TOKENS_PER_STEP for step in steps][: len(curve)],
            "loss": curve,
        },
        "alphas": {},
        "report": {},
        "snr": {},
        "seconds": 10.0,
        "step_seconds": 0.5,
    }
    return {**content, **more}


def mols_result(model: str, arm: str, rate: float, seed: int, loss: float) -> dict[str, Any]:
    """As `result`, with what MoLS and the SNR curves leave."""
    alphas = {"embedding": 4.0 + 0.1 * seed, "vo": 1.0, "qk": 1.5, "other": 1.0}
    groups = {"embedding": [0.01, 0.005], "vo": [0.2, 0.1]}
    return result(
        model,
        arm,
        rate,
        seed,
        loss,
        alphas=alphas,
        probe_passes=2,
        report={"groups": {group: {"clamped": group == "embedding"} for group in alphas}},
        snr={"step": [5, 10], "groups": groups, "median": {"embedding": [0.01, -0.002], "vo": [0.2, None]}},
    )


def study(
    arms: Mapping[str, Mapping[str, float]],
    seeds: Iterable[int] = (1, 2, 3, 4, 5),
    tune_seeds: Iterable[int] = (0,),
    diverged: Iterable[tuple[str, str, int]] = (),
    rates: tuple[float, ...] = RATES,
) -> StudyResults:
    """A finished study. `arms`: arm -> model -> final loss at the best rate, which is the second one; `adam` first.

    `diverged`: (model, arm, seed) that diverged at every rate.
    """
    seeds, tune_seeds, diverged = list(seeds), list(tune_seeds), set(diverged)
    models = list(dict.fromkeys(model for losses in arms.values() for model in losses))
    settings = {arm: {"models": None if set(by) == set(models) else list(by), "about": ""} for arm, by in arms.items()}
    results = StudyResults(
        study={"name": "test", "models": {model: {} for model in models}, "arms": settings}
        | {"seeds": seeds, "tune_seeds": tune_seeds, "lr": list(rates), "baseline": "adam"},
        baseline="adam",
        runs={},
        chosen={},
    )
    best = rates[min(1, len(rates) - 1)]
    for number, (arm, by_model) in enumerate(arms.items()):
        make = mols_result if "mols" in arm else result

        def loss(model: str, rate: float, seed: int, arm: str = arm, number: int = number) -> float:
            if (model, arm, seed) in diverged:
                return math.inf
            far = 0.1 * abs(math.log2(rate / best))
            return arms[arm][model] + SEED_EFFECT[seed] + (-1) ** number * NOISE[seed] + far

        for model in by_model:
            losses = {}
            for rate in rates:
                values = (("lr", rate),)
                for seed in tune_seeds:
                    results.runs[StudyRun(model, arm, values, seed)] = make(
                        model, arm, rate, seed, loss(model, rate, seed)
                    )
                losses[values] = math.fsum(loss(model, rate, seed) for seed in tune_seeds) / len(tune_seeds)
            results.chosen[model, arm] = Chosen((("lr", best),), losses, False)
            for seed in seeds:
                results.runs[StudyRun(model, arm, (("lr", best),), seed)] = make(
                    model, arm, best, seed, loss(model, best, seed)
                )
    return results
