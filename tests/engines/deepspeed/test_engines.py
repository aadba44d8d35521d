"""Measuring on the real engine: modes against each other, loss scales, bad gradients, empty ranks, other models."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engines.deepspeed.engines import LR, STAGES, config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.models import model_of
from tests.engines.deepspeed.state import full_weights, owned
from tests.helpers.harness import Results, run_cases
from tests.helpers.oracle.models import groups_of
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

WORLD = 2
K = 8
ITERATIONS = 12
BAD = 3  # iteration with a spoilt loss, inside of the window that begins at step 1
SMOOTH = ("snr_mean", "snr_pooled", "damping")  # continuous in the gradients; a median can step by a bin of 1 %
FP16_STATIC = {"enabled": True, "loss_scale": 4096}
FP16_GROWING = {"enabled": True, "initial_scale_power": 11, "loss_scale_window": 3, "hysteresis": 1}
FP16_OVERFLOWING = {"enabled": True, "initial_scale_power": 22, "loss_scale_window": 1000, "hysteresis": 1}


def nan_at_rank_1(iteration: int, loss: Tensor) -> Tensor:
    """A loss spike that only one rank sees, once."""
    return loss * math.nan if iteration == BAD and dist.get_rank() == 1 else loss


def nan_from_rank_1(iteration: int, loss: Tensor) -> Tensor:
    return loss * math.nan if iteration >= 1 and dist.get_rank() == 1 else loss


def zero(iteration: int, loss: Tensor) -> Tensor:
    return loss * 0.0


def case(stage: int, mode: str, **more: Any) -> dict[str, Any]:
    return {"stage": stage, "mode": mode, **more}


DAMPING = {"estimator": "damping"}  # defined for every group, even if the median is below the noise floor of K = 8

# lr 0 keeps the weights where they are, so that runs of different modes and precisions see the same gradients.
SPECS: dict[str, dict[str, Any]] = {
    **{f"probe {s} still": case(s, "probe", lr=0.0, **DAMPING) for s in STAGES},
    **{f"online {s} still": case(s, "online", lr=0.0, **DAMPING) for s in STAGES},
    "online BF16_Optimizer still": case(1, "online", lr=0.0, precision="bf16 fp32 grads", **DAMPING),
    "probe BF16_Optimizer still": case(1, "probe", lr=0.0, precision="bf16 fp32 grads", **DAMPING),
    **{f"online {s} moving": case(s, "online", lr=LR / 10, **DAMPING) for s in (2, 3)},
    "online 2 long": case(2, "online", lr=0.0, samples=48, micros=1, **DAMPING),
    "moments 2 long": case(2, "moments", lr=0.0, samples=48, micros=1, **DAMPING),
    "moments 3 long": case(3, "moments", lr=0.0, samples=48, micros=1, **DAMPING),
    **{
        f"fp16 {s} {kind} clip {clip:g}": case(s, "online", lr=0.0, fp16=fp16, clip=clip, micros=1)
        for s in (0, 2, 3)
        for clip in (0.5, 1e3)
        for kind, fp16 in (("static", FP16_STATIC), ("growing", FP16_GROWING))
    },
    **{
        f"fp16 {s} overflowing": case(s, "online", lr=0.0, fp16=FP16_OVERFLOWING, micros=1, start=0, iterations=20)
        for s in (2, 3)
    },
    **{f"nan probe {s}": case(s, "probe", lr=0.0, spoil=nan_at_rank_1) for s in STAGES},
    "nan probe BF16_Optimizer": case(1, "probe", precision="bf16 fp32 grads", spoil=nan_at_rank_1),
    **{f"nan online {s}": case(s, "online", lr=0.0, spoil=nan_at_rank_1) for s in (1, 2, 3)},
    "left out probe 2": case(2, "probe", lr=0.0, leave_out=BAD),
    "left out online 3": case(3, "online", lr=0.0, leave_out=BAD),
    **{f"nan for ever {mode} {s}": case(s, mode, spoil=nan_from_rank_1) for mode, s in (("probe", 3), ("online", 2))},
    "nan for ever moments 2": case(2, "moments", spoil=nan_from_rank_1),
    "zero probe 2": case(2, "probe", spoil=zero),
    "zero online 3": case(3, "online", spoil=zero),
    "auto satisfied": case(2, "online", micros=1, samples="auto", max_samples=64, alpha_rtol=1e6, iterations=20),
    "auto never satisfied": case(3, "probe", micros=1, samples="auto", max_samples=24, alpha_rtol=1e-9, iterations=28),
    "recalibrated": case(3, "online", micros=1, recalibrate={"every": 4}, iterations=24, ramp_end=12),
    "fixed": case(3, "probe", fixed_alphas={"qk": 2.0, "mlp": 0.5}, iterations=4),
    "zero.Init": case(3, "probe", model="plain", under_init=True),
    "not zero.Init": case(3, "probe", model="plain"),
    **{f"LoRA {s}": case(s, "probe", model="lora", start=2) for s in (0, 2, 3)},
}
RUNS = Cases(
    SPECS,
    quick=[
        *("probe 3 still", "online 3 still", "online 2 long", "moments 2 long", "recalibrated", "fixed"),
        *("fp16 2 static clip 0.5", "fp16 2 growing clip 0.5", "fp16 2 static clip 1000"),
        *("nan probe 2", "left out probe 2", "nan for ever probe 3", "auto satisfied"),
    ],
    full=[
        *("probe 1 still", "online 1 still", "online 2 moving"),
        *(f"fp16 {s} growing clip 1000" for s in (0, 2, 3)),
        *("fp16 3 growing clip 0.5", "online 2 still", "LoRA 2"),
        *("nan probe 0", "nan probe 1", "nan online 1", "nan online 2", "nan for ever online 2", "zero online 3"),
    ],
)


def make_model(kind: str, settings: dict[str, Any], under_init: bool) -> nn.Module:
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
        return get_peft_model(model_of(), LoraConfig(r=4, target_modules=targets, lora_dropout=0.0))
    if under_init:
        with deepspeed.zero.Init(config_dict_or_path=settings):
            return model_of(kind)
    return model_of(kind)


def section_of(spec: dict[str, Any]) -> dict[str, Any]:
    names = ("estimator", "samples", "max_samples", "alpha_rtol", "recalibrate", "fixed_alphas")
    chosen = {name: spec[name] for name in names if name in spec}
    section = {"start": spec.get("start", 1), "ramp_end": spec.get("ramp_end", 200), "mode": spec["mode"], "samples": K}
    return section | {"alpha_min": 1e-3, "alpha_max": 1e3} | chosen


def build_engine(spec: dict[str, Any]) -> Any:
    micros, precision = spec.get("micros", 2), spec.get("precision", "fp32")
    more = {"gradient_clipping": spec["clip"]} if "clip" in spec else {}
    if "fp16" in spec:
        precision, more = "fp16", {**more, "fp16": dict(spec["fp16"])}
    settings = config(spec["stage"], section_of(spec), precision=precision, micros=micros, **more)
    model = make_model(spec.get("model", "llama"), settings, spec.get("under_init", False))
    lr = spec.get("lr", LR)
    return engine_of(settings, model, torch.optim.AdamW(groups_of(model, lr, 2 * lr, 0.1), betas=(0.9, 0.95), eps=1e-6))


def scale_of(engine: Any) -> float:
    outer = engine.optimizer
    holder = getattr(outer, "loss_scale_config", None)
    return float(holder.cur_scale if holder is not None else getattr(outer, "loss_scale", 1.0))


def run(name: str) -> dict[str, Any]:
    """Run ITERATIONS of a user's loop. Returns messages and state of MoLS on this rank."""
    spec = SPECS[name]
    spoil, micros = spec.get("spoil"), spec.get("micros", 2)
    seen: dict[str, Any] = {"phases": [], "scales": [], "bytes": [], "multipliers": [], "alphas over time": []}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = build_engine(spec)
        seen["head"] = sum(numel for parameter, _, numel, _ in owned(engine) if "lm_head" in parameter)
        seen["sub-groups"] = len(getattr(engine.optimizer, "fp16_groups", []))
        iterations = spec.get("iterations") or spec.get("samples", K) + ITERATIONS - K
        for i in range(iterations):
            seen["phases"].append(engine.mols.phase)
            seen["scales"].append(scale_of(engine))
            number = i + 1 if i >= spec.get("leave_out", iterations) else i
            iterate(engine, number, micros, None if spoil is None else functools.partial(spoil, i))
            seen["bytes"].append(engine.mols.accumulator_bytes)
            seen["multipliers"].append(engine.mols.multipliers)
            seen["alphas over time"].append(engine.mols.alphas)
        messages = [str(w.message) for w in caught if "Mols" in w.category.__name__]
    mols = engine.mols
    seen |= {"phase": mols.phase, "alphas": mols.alphas, "samples": mols.samples, "report": mols.report()}
    seen |= {"warnings": messages, "steps": engine.global_steps}
    if "nan" not in name:
        seen["finite"] = all(bool(torch.isfinite(w).all()) for w in full_weights(engine).values())
    engine.destroy()
    return seen


@functools.cache
def runs() -> Results:
    return run_cases(run, WORLD, [(name,) for name in RUNS.wanted], timeout=60)


def result(name: str) -> dict[str, Any]:
    """Rank 0's, after a look that all ranks agree bit for bit."""
    first, *others = runs()[name,]
    for other in others:
        for key in ("phases", "alphas", "samples", "report", "scales", "multipliers"):
            assert repr(other[key]) == repr(first[key]), key
    return dict(first)


def distance(a: dict[str, Any], b: dict[str, Any], keys: tuple[str, ...] = SMOOTH) -> float:
    """Largest relative difference of a statistic in any group of two reports."""
    one, two = a["report"]["groups"], b["report"]["groups"]
    assert one.keys() == two.keys()
    return max(abs(one[g][key] / two[g][key] - 1) for g in one for key in keys)


def alpha_ratio(a: dict[str, Any], b: dict[str, Any]) -> float:
    return max(max(x / y, y / x) for x, y in ((a["alphas"][g], b["alphas"][g]) for g in a["alphas"]))


# ---------------------------------------------------------------------- modes


@RUNS.parametrize(
    "layout",
    [*STAGES, "BF16_Optimizer"],
    reads=lambda layout: (f"online {layout} still", f"probe {layout} still"),
)
def test_online_equals_probe_where_weights_stand_still(layout: Any) -> None:
    """Only the undoing of clipping differs: an element's product of two rounded factors, 1e-7 of it. Seen: 2e-7."""
    online, probe = result(f"online {layout} still"), result(f"probe {layout} still")
    assert distance(online, probe) < 2e-6
    assert distance(online, probe, ("snr_median",)) < 1e-2  # a bin
    assert alpha_ratio(online, probe) - 1 < 1e-6
    assert online["steps"] == ITERATIONS and probe["steps"] == ITERATIONS - K
    spread = [a for g, a in probe["alphas"].items() if g != "other"]
    assert max(spread) / min(spread) > 1.2  # there is something to compare


@RUNS.parametrize("stage", [2, 3], reads=lambda stage: (f"online {stage} moving", f"probe {stage} still"))
def test_online_stays_near_probe_while_weights_move(stage: int) -> None:
    """The stated distance: within a factor of 1.1 of every alpha at a tenth of the base rate, as early in warm-up."""
    assert 1.0 < alpha_ratio(result(f"online {stage} moving"), result(f"probe {stage} still")) < 1.1


@RUNS.parametrize("stage", [2, 3], reads=lambda stage: (f"moments {stage} long", "online 2 long"))
def test_moments_stay_near_online(stage: int) -> None:
    """Adam's averages see fewer samples than the 48 of the window; the stated distance is a factor of 1.1."""
    moments, online = result(f"moments {stage} long"), result("online 2 long")
    assert moments["report"]["mode"] == "moments" and max(moments["bytes"]) == 0
    assert 1.0 < alpha_ratio(moments, online) < 1.1
    assert moments["phases"].count("calibrating") == 48


@RUNS.reads("probe 3 still", "online 3 still")
def test_phases_memory_and_sub_groups() -> None:
    for name in ("probe 3 still", "online 3 still"):
        seen = result(name)
        assert seen["phases"] == ["waiting"] + ["calibrating"] * K + ["ramping"] * (ITERATIONS - K - 1)
        assert [size > 0 for size in seen["bytes"]] == [1 <= i < K for i in range(ITERATIONS)]
        assert seen["sub-groups"] > 1


# ---------------------------------------------------------------------- loss scales


def scaled(case: tuple[int, float]) -> list[str]:
    """What the test below compares."""
    stage, clip = case
    return [f"fp16 {stage} growing clip {clip:g}", *(f"fp16 {stage} static clip {c:g}" for c in (0.5, 1e3))]


@RUNS.parametrize(
    ("stage", "clip"),
    [(stage, clip) for clip in (0.5, 1e3) for stage in (0, 2, 3)],
    reads=scaled,
    ids=lambda case: f"{case[0]}-{'clipped' if case[1] == 0.5 else 'not clipped'}",
)
def test_a_growing_loss_scale_does_not_show(stage: int, clip: float) -> None:
    """DeepSpeed divides by the new scale on the step where it grows; a sample off by 2 would move SNRs by far more
    than the 2 % left for fp16's subnormal numbers."""
    growing, static = (result(f"fp16 {stage} {kind} clip {clip:g}") for kind in ("growing", "static"))
    inside = [s for s, phase in zip(growing["scales"], growing["phases"], strict=True) if phase == "calibrating"]
    assert len(set(inside)) >= 2, inside
    assert len(set(static["scales"])) == 1
    assert distance(growing, static, ("snr_pooled", "damping")) < 0.02
    clipped, free = (result(f"fp16 {stage} static clip {c:g}") for c in (0.5, 1e3))
    assert distance(clipped, free, ("snr_pooled", "damping")) < 1e-4


@RUNS.parametrize("stage", [2, 3], reads=lambda stage: (f"fp16 {stage} overflowing", f"fp16 {stage} static clip 0.5"))
def test_overflow_steps_are_left_out(stage: int) -> None:
    seen = result(f"fp16 {stage} overflowing")
    skipped = seen["report"]["skipped_samples"]
    assert seen["scales"][0] > seen["scales"][-1] and skipped >= 2
    assert seen["samples"] == K == seen["report"]["samples"]
    assert seen["phases"].count("calibrating") == K + skipped
    assert sum("left out on every rank" in w for w in seen["warnings"]) == skipped
    assert all(math.isfinite(a) for a in seen["alphas"].values())
    assert distance(seen, result(f"fp16 {stage} static clip 0.5"), ("damping",)) < 0.5  # other batches, same kind


# ---------------------------------------------------------------------- bad gradients

ONCE = [*(f"nan probe {s}" for s in STAGES), "nan probe BF16_Optimizer", *(f"nan online {s}" for s in (1, 2, 3))]


@RUNS.parametrize("name", ONCE)
def test_a_nan_on_one_rank_leaves_the_sample_out_everywhere(name: str) -> None:
    for seen in runs()[name,]:
        assert seen["samples"] == K and seen["report"]["skipped_samples"] == 1
        assert all(math.isfinite(a) and a > 0 for a in seen["alphas"].values())
        assert seen["phases"].count("calibrating") == K + 1
    first = result(name)
    assert sum("left out on every rank" in w for w in first["warnings"]) == 1
    assert runs()[name,][1]["warnings"] == []  # once a job, not once a rank


@RUNS.parametrize(
    ("bad", "clean"),
    [("nan probe 2", "left out probe 2"), ("nan online 3", "left out online 3")],
    reads=lambda pair: pair,
)
def test_a_left_out_sample_leaves_nothing_behind(bad: str, clean: str) -> None:
    """The same alphas, bit for bit, as a run whose data never had that batch."""
    assert result(bad)["alphas"] == result(clean)["alphas"]
    assert result(bad)["report"]["groups"] == result(clean)["report"]["groups"]


@RUNS.parametrize("name", ["nan for ever probe 3", "nan for ever online 2", "nan for ever moments 2"])
def test_training_goes_on_with_alpha_1_after_k_bad_samples(name: str) -> None:
    seen = result(name)
    assert set(seen["alphas"].values()) == {1.0} and seen["phase"] == "ramping"
    assert seen["phases"].count("calibrating") == K
    assert seen["report"]["failed"] and all(row["snr"] is None for row in seen["report"]["groups"].values())
    assert any("the calibration failed" in w and "alpha = 1" in w for w in seen["warnings"])
    assert seen["bytes"][-1] == 0


@RUNS.parametrize("name", ["zero probe 2", "zero online 3"])
def test_zero_gradients(name: str) -> None:
    """No information: alpha 1, loudly; the weights stay finite."""
    seen = result(name)
    assert set(seen["alphas"].values()) == {1.0} and seen["finite"]
    assert any("the calibration failed" in w for w in seen["warnings"])


# ---------------------------------------------------------------------- ranks and models


@RUNS.reads("probe 2 still", "probe 3 still")
def test_a_rank_without_any_head_element() -> None:
    """Stage 2 splits the flat weights in two; llama's head is at one end."""
    heads = [seen["head"] for seen in runs()["probe 2 still",]]
    assert min(heads) == 0 < max(heads), heads
    assert result("probe 2 still")["report"]["groups"]["head"]["elements"] == sum(heads)
    assert distance(result("probe 2 still"), result("probe 3 still")) < 2e-6


@RUNS.reads("auto satisfied")
def test_auto_stops_as_soon_as_the_intervals_are_narrow() -> None:
    seen = result("auto satisfied")
    assert seen["samples"] == 16 and seen["phase"] == "ramping"


@RUNS.reads("auto never satisfied")
def test_auto_stops_at_max_samples() -> None:
    seen = result("auto never satisfied")
    assert seen["samples"] == 24 and seen["phase"] == "ramping"


@RUNS.reads("recalibrated")
def test_recalibration() -> None:
    """Window of 8 from step 1, ramp to 12, again 4 steps after its end: the former multipliers apply meanwhile."""
    seen = result("recalibrated")
    first, second = seen["phases"].index("calibrating"), seen["phases"].index("fixed")
    again = seen["phases"].index("calibrating", second)
    assert (first, second) == (1, 12) and again >= 9 + 4
    before = seen["multipliers"][again - 1]
    assert all(seen["multipliers"][i] == before for i in range(again, again + K))
    assert before == pytest.approx(seen["alphas over time"][again - 1])
    assert seen["alphas"] != seen["alphas over time"][again - 1]
    assert seen["bytes"][again] > 0 == seen["bytes"][-1]


@RUNS.reads("fixed")
def test_fixed_alphas_measure_nothing() -> None:
    seen = result("fixed")
    assert seen["alphas"] == {"embedding": 1.0, "head": 1.0, "qk": 2.0, "vo": 1.0, "mlp": 0.5, "other": 1.0}
    assert max(seen["bytes"]) == 0 and seen["samples"] == 0 and seen["report"]["mode"] == "fixed"
    assert seen["steps"] == 4  # no step is taken from training


@RUNS.reads("zero.Init", "not zero.Init")
def test_zero_init() -> None:
    """A model that was never whole on any rank: the same statistics bit for bit, names and shapes from `ds_shape`."""
    under, plain = result("zero.Init"), result("not zero.Init")
    assert under["report"]["groups"] == plain["report"]["groups"]
    assert under["report"]["groups"]["head"]["elements"] == 97 * 19
    assert under["report"]["groups"]["other"]["elements"] == 33 + 19 + 2 * 19


@RUNS.parametrize("stage", [0, 2, 3], reads=lambda stage: (f"LoRA {stage}", "LoRA 0"))
def test_lora(stage: int) -> None:
    """Adapters take the group of the layer that they adapt; the frozen weights are no part of anything."""
    seen = result(f"LoRA {stage}")
    groups = seen["report"]["groups"]
    assert set(groups) == {"qk", "vo", "mlp"}
    assert groups["mlp"]["elements"] == 2 * 4 * (67 + 40) and groups["qk"]["elements"] == 2 * 4 * (40 + 40)
    assert groups["vo"]["elements"] == 2 * groups["qk"]["elements"]
    assert seen["finite"] and all(row["snr"] is not None for row in groups.values())
    assert distance(seen, result("LoRA 0")) < 1e-3
