"""Scaled and unscaled weight decay on every stage against per-element AdamW with the decay written out."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from tests.engines.deepspeed.engines import CLIP, OFFLOAD, STAGES, config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.state import full_weights
from tests.engines.deepspeed.test_rates import ATOL, alphas_of, schedule
from tests.helpers.digests import caught
from tests.helpers.harness import Results, run_cases
from tests.helpers.oracle.adamw import AdamSettings, ElementwiseAdamW
from tests.helpers.oracle.models import build, masks
from tests.helpers.oracle.statistics import gradient_sample
from tests.helpers.tiers import Cases

WORLD, PASSES, MICROS, MODEL = 2, 16, 1, "gpt2"  # GPT-2's fused columns go by delta
DECAY = 2.0  # 5 % of a weight over the run at the base rate, 15 % at the embedding's
DIFFERENCE = 1e-3  # of the two values
SECTION = {"start": 2, "samples": 4, "ramp_end": 10, "mode": "online"}


def settings(value: str) -> AdamSettings:
    return AdamSettings(
        lr=2e-3, eps=1e-4, weight_decay=DECAY, vector_lr_factor=2.0, clip=CLIP, scaled_decay=value == "scaled"
    )


def train(stage: int, value: str, mode: str, variant: str) -> dict[str, Any]:
    """On each rank: the weights, and the pass and the multipliers of each update."""
    alphas = {"fixed_alphas": alphas_of(MODEL)} if mode == "fixed" else {"mode": mode}
    section = {**SECTION, **alphas, "weight_decay": value}
    zero = OFFLOAD if variant == "offload" else {}
    made = config(stage, section, micros=MICROS, zero=zero)
    engine, applied = engine_of(made, MODEL, settings(value), schedule=schedule), []
    for number in range(PASSES):
        before = engine.global_steps
        iterate(engine, number, MICROS)
        if engine.global_steps > before:
            applied.append((number, dict(engine.mols.multipliers)))
    decays = sorted({group["weight_decay"] for group in engine.optimizer.param_groups})
    plans = engine.mols.scaler.plans.values()
    result = {
        "weights": full_weights(engine),
        "applied": applied,
        "report": engine.mols.report(),
        "decays": decays,
        "several groups": any(len(plan.segments) > 1 or plan.interleaved for plan in plans),
    }
    engine.destroy()
    return result


def refused(stage: int, name: str) -> str:
    """On each rank: message of initialize for "unscaled" with an optimizer of the config."""
    import mols_ds
    from mols_ds.errors import MolsUnsupportedError

    kind, decay = name.split()
    made = config(stage, {**SECTION, "weight_decay": "unscaled"}, micros=MICROS)
    made["optimizer"] = {"type": kind, "params": {"lr": 1e-3, "weight_decay": float(decay)}}
    if kind == "AdamW":
        made["optimizer"]["params"]["torch_adam"] = True
    if kind == "Lamb":
        made["optimizer"]["source"] = "library"
    try:
        with caught():
            engine = engine_of(made, MODEL, initialize=mols_ds.initialize)
    except MolsUnsupportedError as error:
        return str(error)
    iterate(engine, 0, MICROS)
    engine.destroy()
    return ""


def work(kind: str, *arguments: Any) -> Any:
    return {"train": train, "refused": refused}[kind](*arguments)


TRAINED = [
    *((stage, value, "fixed", "") for stage in STAGES for value in ("scaled", "unscaled")),
    *((stage, "unscaled", "fixed", "offload") for stage in (1, 2, 3)),
    *((stage, "unscaled", mode, "") for stage, mode in ((0, "online"), (1, "moments"), (2, "probe"), (3, "online"))),
]
REFUSED = [(0, "SGD 0.1"), (2, "RMSprop 0.1"), (3, "Lamb 0.1"), (1, "SGD 0.0"), (1, "AdamW 0.1")]
CASES = Cases(
    [*(("train", *case) for case in TRAINED), *(("refused", *case) for case in REFUSED)],
    quick=[
        ("train", 0, "unscaled", "fixed", ""),
        ("train", 3, "unscaled", "online", ""),
        ("refused", 2, "RMSprop 0.1"),
    ],
)


@functools.cache
def results() -> Results:
    return run_cases(work, WORLD, CASES.wanted, timeout=200)


def oracle(value: str, applied: list[tuple[int, dict[str, float]]]) -> dict[str, Tensor]:
    """The reference's weights after these updates."""
    reference = build(MODEL)
    optimizer = ElementwiseAdamW(reference, masks(MODEL, reference), settings(value))
    for number, multipliers in applied:
        factor = schedule(optimizer.steps)
        optimizer.step(gradient_sample(reference, number, WORLD, MICROS), factor, multipliers)
    return {name: p.detach().clone() for name, p in reference.named_parameters()}


@CASES.parametrize(("kind", "stage", "value", "mode", "variant"), [("train", *case) for case in TRAINED])
def test_weights_equal_per_element_adamw(kind: str, stage: int, value: str, mode: str, variant: str) -> None:
    found = results()[kind, stage, value, mode, variant]
    applied = found[0]["applied"]
    assert len(applied) == PASSES - (SECTION["samples"] if mode == "probe" else 0)
    truth = oracle(value, applied)
    other = oracle("scaled" if value == "unscaled" else "unscaled", applied)
    for outcome in found:
        errors = {name: float((outcome["weights"][name] - w).abs().max()) for name, w in truth.items()}
        assert outcome["several groups"], "a tensor of several module groups on each rank, else nothing is cut"
        assert max(errors.values()) <= ATOL, max(errors.items(), key=lambda item: item[1])
        wrong = {name: float((outcome["weights"][name] - w).abs().max()) for name, w in other.items()}
        assert max(wrong.values()) > DIFFERENCE, "the two values differ far beyond the tolerance"
        assert outcome["report"]["weight_decay"] == value
        assert outcome["decays"] == [0.0, DECAY], "the user's own decay is in the groups"


@CASES.parametrize(("kind", "stage", "name"), [("refused", *case) for case in REFUSED])
def test_what_cannot_be_unscaled_is_refused_by_name(kind: str, stage: int, name: str) -> None:
    optimizer, decay = name.split()
    for said in results()[kind, stage, name]:
        if optimizer == "AdamW" or float(decay) == 0:
            assert said == ""
        else:
            assert f'"weight_decay": "unscaled" with {optimizer.replace("Lamb", "ShardedLamb")} (' in said
            assert '"scaled"' in said and "\n" not in said
