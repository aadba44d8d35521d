"""MolsCallback in the real Trainer and SFTTrainer: a run with it has the stock run's counts, schedule, data, logs and
checkpoints, and goes on bit for bit from a checkpoint of every phase."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from dataclasses import replace
from typing import Any

import pytest

import mols_ds
from mols_ds.integrations.transformers import MolsCallback
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases
from tests.integrations.trainers import (
    CLAMPED,
    RAMP_END,
    SAMPLES,
    START,
    Spec,
    Watch,
    interrupted,
    make,
    own_folder,
    train,
)

pytestmark = pytest.mark.distributed

EVALUATING: dict[str, Any] = {
    "max_steps": -1,
    "num_train_epochs": 3,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
}
COUNTS: dict[str, Spec] = {
    "stage 2": Spec(),
    "stage 3": Spec(stage=3),
    "stage 2, accumulation, epochs, evaluations": Spec(micros=2, arguments=EVALUATING),
    "stage 3, accumulation, epochs, evaluations": Spec(stage=3, micros=4, arguments=EVALUATING),
    "optimizer and scheduler of DeepSpeed": Spec(ds="deepspeed"),
    "auto": Spec(mols={"total_steps": "auto", "ramp_end": "auto", "start": 0, "samples": SAMPLES}, micros=2),
    "stage 0": Spec(stage=0, micros=2),
    "calibrates again": Spec(stage=3, mols={"recalibrate": {"every": 4}}),
    "sft": Spec(trainer="sft", micros=2),
    "sft with LoRA, stage 3": Spec(trainer="sft", stage=3, lora=True),
    "dpo": Spec(trainer="dpo"),
    "dpo, stage 3": Spec(trainer="dpo", stage=3, micros=2),
}
ONLINE = {"mode": "online", "ramp_end": 11}
RESUME: dict[str, tuple[Spec, dict[int, str]]] = {
    "probe 2": (Spec(), {2: "waiting", START: "calibrating", 6: "ramping", 12: "fixed"}),
    "probe 3": (Spec(stage=3, micros=2), {2: "waiting", START: "calibrating", 6: "ramping", 12: "fixed"}),
    "online 2": (Spec(mols=ONLINE), {2: "waiting", 6: "calibrating", 9: "ramping", 12: "fixed"}),
    "online 3": (Spec(stage=3, mols=ONLINE), {2: "waiting", 6: "calibrating", 9: "ramping", 12: "fixed"}),
    "sft": (Spec(trainer="sft"), {START: "calibrating", 6: "ramping"}),
}


def counts(name: str) -> dict[str, Any]:
    """The stock run; one whose alphas are all clamped to 1; and one as it is meant."""
    spec = COUNTS[name]
    stock = train(replace(spec, how="stock", mols=None, out="stock"))
    clamped = train(replace(spec, mols={**(spec.mols or {}), **CLAMPED}, out="clamped"))
    return {"stock": stock, "clamped": clamped, "real": train(replace(spec, out="real"))}


def resume(name: str) -> dict[str, Any]:
    spec, phases = RESUME[name]
    return interrupted(spec, lambda step: step in phases)


def ways() -> dict[str, Any]:
    """The section as an argument; `patch` alone, in a mode that takes every step; both of them."""
    found = {"config": train(Spec()), "argument": train(Spec(argument=True, out="argument"))}
    online = {**ONLINE, "total_steps": 14}
    found["patch"] = train(Spec(how="patch", mols=online, out="patch"))
    found["callback online"] = train(Spec(mols=online, out="callback"))
    mols_ds.patch()
    found["patch and callback"] = train(Spec(out="both"))
    return found


def refusals() -> dict[str, str]:
    found = {}

    def note(name: str, spec: Spec, callback: MolsCallback, bind: bool = True) -> None:
        watch = Watch()
        watch.trainer = trainer = make(spec, watch, callback)
        try:
            if bind:
                callback.bind(trainer)
            trainer.train()
            found[name] = "trained"
        except mols_ds.MolsError as error:
            found[name] = f"{type(error).__name__}: {error}"

    note("unbound", Spec(), MolsCallback(), bind=False)
    note("no section", Spec(mols=None), MolsCallback())
    note("two sections", Spec(), MolsCallback({"start": 3}))
    note("wrong key", Spec(mols={"sampels": 3}), MolsCallback())
    note("off", Spec(mols={"enabled": False}), MolsCallback())
    first = MolsCallback()
    first.bind(make(Spec(), Watch(), first))
    note("two trainers", Spec(), first)
    note("bound late", Spec(), BoundLate())
    return found


class BoundLate(MolsCallback):
    """Is bound when the Trainer has built its engine already."""

    def bind(self, trainer: Any) -> MolsCallback:
        self.late = trainer
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().bind(self.late)
        super().on_train_begin(args, state, control, **kwargs)


WORK = {"counts": counts, "resume": resume, "ways": ways, "refusals": refusals}
Case = tuple[int, str, str]
TABLE: list[Case] = [
    *((world, "counts", name) for world in (1, 2) for name in COUNTS),
    *((world, "resume", name) for world in (1, 2) for name in RESUME),
    (1, "ways", ""),
    (1, "refusals", ""),
]
IN_ALL = {
    (1, "counts", "stage 2, accumulation, epochs, evaluations"),
    (1, "counts", "auto"),
    (1, "counts", "optimizer and scheduler of DeepSpeed"),
    (1, "counts", "stage 0"),
    (2, "counts", "stage 3, accumulation, epochs, evaluations"),
    (2, "counts", "sft with LoRA, stage 3"),
    (1, "counts", "dpo, stage 3"),
    (1, "resume", "probe 2"),
    (1, "resume", "online 3"),
    (2, "resume", "probe 3"),
    (1, "ways", ""),
    (1, "refusals", ""),
}
CASES: Cases[Case] = Cases(TABLE, full=lambda case: case not in IN_ALL)


def one(kind: str, name: str) -> Any:
    with contextlib.chdir(own_folder(f"{kind} {name}")):
        return WORK[kind](*([name] if name else []))


@functools.cache
def runs(world: int) -> Results:
    wanted = [(kind, name) for w, kind, name in CASES.wanted if w == world]
    return run_cases(one, world, wanted, timeout=240)


def results(world: int, kind: str, name: str = "") -> list[Any]:
    if name.startswith(("sft", "dpo")):
        missing = [library for library in ("trl", "peft") if importlib.util.find_spec(library) is None]
        if missing:
            pytest.skip(f"{', '.join(missing)} is not installed")
    return runs(world)[kind, name]


def without_phase(seen: dict[str, Any]) -> list[Any]:
    return [row[:-1] for row in seen["rows"]]


def losses(seen: dict[str, Any]) -> list[dict[str, float]]:
    """Rows of the log, without the tokens that TRL counts from each start on."""
    rows = [row for row in seen["log with mols"] if "loss" in row]
    return [{key: value for key, value in row.items() if key != "num_tokens"} for row in rows]


WORLDS = [(world, name) for world in (1, 2) for name in COUNTS]


@CASES.parametrize(("world", "name"), WORLDS, reads=lambda value: [(value[0], "counts", value[1])])
def test_the_run_is_the_stock_one(world: int, name: str) -> None:
    """With alphas of 1: weights, order of the data, logs, evaluations, checkpoints and counts, bit for bit."""
    for seen in results(world, "counts", name):
        stock, clamped = seen["stock"], seen["clamped"]
        assert clamped["samples"] == SAMPLES and set(clamped["alphas"].values()) == {1.0}
        for key in ("log", "weights", "saved", "best", "random", "flos", "loaders"):
            assert clamped[key] == stock[key], key
        assert without_phase(clamped) == without_phase(stock)
        if "read" in stock:  # extra batches are read between them
            rest = iter(clamped["read"])
            assert all(index in rest for index in stock["read"])
            assert len(clamped["read"]) > len(stock["read"])


@CASES.parametrize(("world", "name"), WORLDS, reads=lambda value: [(value[0], "counts", value[1])])
def test_schedule_counts_and_logs(world: int, name: str) -> None:
    """With the measured alphas: counts and schedule are the stock run's, and our keys are in the Trainer's history."""
    for seen in results(world, "counts", name):
        stock, real = seen["stock"], seen["real"]
        assert without_phase(real) == without_phase(stock)
        assert real["phase"] == "fixed" or "evaluations" in name or "again" in name
        assert len(set(real["alphas"].values())) > 2
        rows = losses(real)
        assert [row["step"] for row in rows] == [row["step"] for row in losses(stock)]
        # DeepSpeed has stepped its own scheduler when the Trainer looks at the rate
        rates = [row["learning_rate"] for row in rows]
        applied = [0.0, *rates] if COUNTS[name].ds == "deepspeed" else rates
        for row, rate in zip(rows, applied, strict=False):
            for group in real["alphas"]:
                assert row[f"mols/lr/{group}"] == pytest.approx(rate * row[f"mols/multiplier/{group}"], rel=1e-12)
        last = {group: rows[-1][f"mols/alpha/{group}"] for group in real["alphas"]}
        if rows[-1]["step"] > RAMP_END and "again" not in name:
            assert last == {group: rows[-1][f"mols/multiplier/{group}"] for group in last} == real["alphas"]
        assert all(f"mols/snr/{group}" in rows[-1] for group in ("vo", "qk", "mlp"))


PHASES = [(world, name) for world in (1, 2) for name in RESUME]


@CASES.parametrize(("world", "name"), PHASES, reads=lambda value: [(value[0], "resume", value[1])])
def test_a_checkpoint_of_every_phase_goes_on_bit_for_bit(world: int, name: str) -> None:
    phases = RESUME[name][1]
    for seen in results(world, "resume", name):
        whole = seen["whole"]
        assert {step: whole["rows"][step - 1][-1] for step in phases} == phases
        for step, resumed in seen["resumed"].items():
            for key in ("weights", "alphas", "applied", "random"):
                assert resumed[key] == whole[key], (phases[step], key)
            assert losses(resumed) == losses(whole), phases[step]
        assert set(seen["resumed"]) == set(phases)


@CASES.reads((1, "ways", ""))
def test_the_section_comes_from_the_config_or_an_argument_and_patch_serves_as_well() -> None:
    (seen,) = results(1, "ways")
    assert seen["argument"]["weights"] == seen["config"]["weights"]
    assert seen["patch and callback"]["weights"] == seen["config"]["weights"]
    assert seen["patch"]["weights"] == seen["callback online"]["weights"]
    assert len(set(seen["patch"]["alphas"].values())) > 2
    assert [row[-1] for row in seen["config"]["rows"]][START - 1 : RAMP_END] == [
        "calibrating",
        *["ramping"] * 4,
        "fixed",
    ]


@CASES.reads((1, "refusals", ""))
def test_a_section_is_never_silently_ignored() -> None:
    (seen,) = results(1, "refusals")
    assert seen["unbound"] == (
        "MolsError: MolsCallback does not know its trainer: call callback.bind(trainer) before trainer.train()"
    )
    assert 'no "mols" section' in seen["no section"]
    assert 'the "mols" sections of the argument and of the DeepSpeed config differ' in seen["two sections"]
    assert 'unknown key; did you mean "samples"' in seen["wrong key"]
    assert seen["off"] == "trained"
    assert "bound to another trainer" in seen["two trainers"]
    assert "has no MoLS: its engine was built before bind(trainer)" in seen["bound late"]
