"""Accelerate's usual loop over DeepSpeed: one call after `prepare`, or `mols_ds.patch()`."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import get_linear_schedule_with_warmup, set_seed

import mols_ds
from mols_ds.integrations.accelerate import attach, log_values
from tests.engines.deepspeed.state import full_weights
from tests.helpers.digests import digest
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases
from tests.integrations.trainers import Examples, model, own_folder

pytestmark = pytest.mark.distributed

ITERATIONS, MICROS, SAMPLES, START, RAMP_END = 14, 2, 4, 3, 7
UPDATES = ITERATIONS - SAMPLES
SECTION: dict[str, Any] = {
    "start": START,
    "samples": SAMPLES,
    "ramp_end": RAMP_END,
    "noise_floor_correction": False,
    "estimator": "mean",
    "report_dir": "report",
}
WINDOW = range(START, START + SAMPLES)  # iterations, counted from 0, whose steps are discarded


class Loop:
    """The usual loop; `how`: "attach", "patch", "both" or "stock"."""

    def __init__(self, stage: int, how: str) -> None:
        for state in (AcceleratorState, GradientState):
            state._reset_state()
        PartialState(cpu=True)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
            "gradient_accumulation_steps": MICROS,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
            "steps_per_print": 10**9,
        }
        if how in ("patch", "both"):
            config["mols"] = SECTION
            mols_ds.patch()
        plugin = DeepSpeedPlugin(hf_ds_config=config)
        self.accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=MICROS)
        set_seed(0)
        net = model()
        inner = torch.optim.AdamW(net.parameters(), lr=1e-3)
        processes = self.accelerator.num_processes
        plan = get_linear_schedule_with_warmup(inner, 2 * processes, UPDATES * processes)
        rows = [row.clone() for row in Examples().rows]
        loader = torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=1)
        self.engine, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(net, inner, loader, plan)
        if how in ("attach", "both"):
            section = None if how == "both" else SECTION
            attach(self.engine, section, scheduler=self.scheduler, optimizer=self.optimizer)
        mols_ds.unpatch()
        self.iteration = 0

    def run(self, until: int) -> list[dict[str, Any]]:
        """One row an iteration. Its batches are told by its number alone."""
        seen = []
        batches = list(self.loader)
        while self.iteration < until:
            for micro in range(MICROS):
                batch = batches[(MICROS * self.iteration + micro) % len(batches)]
                self.accelerator.gradient_state._set_sync_gradients(micro == MICROS - 1)
                self.accelerator.backward(self.engine(**batch).loss)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            self.iteration += 1
            seen.append(
                {
                    "skipped": bool(self.accelerator.optimizer_step_was_skipped),
                    "lr": float(self.scheduler.get_last_lr()[0]),
                    "updates": self.engine.global_steps,
                    "micro": self.engine.micro_steps,
                    "phase": self.engine.mols.phase if hasattr(self.engine, "mols") else "stock",
                }
            )
        return seen

    def end(self) -> dict[str, Any]:
        weights = {name: digest(weight) for name, weight in full_weights(self.engine).items()}
        found: dict[str, Any] = {"weights": weights}
        if hasattr(self.engine, "mols"):
            found |= {"alphas": self.engine.mols.alphas, "logs": log_values(self.engine.mols)}
        self.engine.destroy()
        return found


def count(stage: int) -> dict[str, Any]:
    found = {}
    for how in ("attach", "patch", "both"):
        loop = Loop(stage, how)
        found[how] = {"rows": loop.run(ITERATIONS), **loop.end()}
    return found


def resume(stage: int) -> dict[str, Any]:
    """Saved in the middle of the window, in the ramp and after it."""
    loop, found = Loop(stage, "attach"), {}
    for stop in (START + 2, START + SAMPLES + 2, ITERATIONS - 2):
        found[stop] = loop.run(stop)[-1]["phase"]
        loop.accelerator.save_state(f"saved{stop}")
    loop.run(ITERATIONS)
    result: dict[str, Any] = {"phases": found, "whole": loop.end(), "resumed": {}}
    for stop in found:
        again = Loop(stage, "attach")
        again.accelerator.load_state(f"saved{stop}")
        again.iteration = stop
        again.run(ITERATIONS)
        result["resumed"][stop] = again.end()
    return result


def refusals() -> dict[str, str]:
    loop, found = Loop(2, "stock"), {}
    things = {"engine": loop.engine, "optimizer": loop.optimizer, "model": loop.engine.module}
    for name, thing in things.items():
        with pytest.raises(mols_ds.MolsConfigError) as raised:
            attach(thing, None if name == "engine" else SECTION)
        found[name] = str(raised.value)
    return found


WORK = {"count": count, "resume": resume, "refusals": refusals}
Case = tuple[Any, ...]
TABLE: list[Case] = [
    *((world, kind, stage) for world in (1, 2) for kind in ("count", "resume") for stage in (0, 2, 3)),
    (1, "refusals"),
]
IN_ALL = [(1, "count", 0), (1, "count", 3), (2, "count", 2), (1, "resume", 2), (2, "resume", 3), (1, "refusals")]
CASES: Cases[Case] = Cases(TABLE, full=lambda case: case not in IN_ALL)


def one(kind: str, *stage: int) -> Any:
    with contextlib.chdir(own_folder(f"{kind}{stage}")):
        return WORK[kind](*stage)  # type: ignore[operator]


@functools.cache
def runs(world: int) -> Results:
    return run_cases(one, world, [case[1:] for case in CASES.wanted if case[0] == world], timeout=240)


PLACES = [(world, stage) for world in (1, 2) for stage in (0, 2, 3)]


@CASES.parametrize(("world", "stage"), PLACES, reads=lambda value: [(value[0], "count", value[1])])
def test_a_discarded_step_is_a_skipped_one(world: int, stage: int) -> None:
    """The schedule stands still in the window and ends at 0; micro_steps counts the steps that were taken."""
    for seen in runs(world)["count", stage]:
        rows = seen["attach"]["rows"]
        assert [row["skipped"] for row in rows] == [i in WINDOW for i in range(ITERATIONS)]
        assert [row["updates"] for row in rows] == [i + 1 - sum(j <= i for j in WINDOW) for i in range(ITERATIONS)]
        assert [row["micro"] for row in rows] == [row["updates"] for row in rows]
        assert len({rows[i]["lr"] for i in range(START - 1, START + SAMPLES)}) == 1
        assert rows[-1]["lr"] == 0.0 and rows[-1]["phase"] == "fixed"


@CASES.parametrize(("world", "stage"), PLACES, reads=lambda value: [(value[0], "count", value[1])])
def test_patch_does_the_same_and_attach_adopts_its_engine(world: int, stage: int) -> None:
    for seen in runs(world)["count", stage]:
        assert seen["both"] == seen["attach"]
        if (
            stage > 0
        ):  # nothing of stage 0 in fp32 can say that a step was skipped, unless attach is given the optimizer
            assert seen["patch"] == seen["attach"]
        else:
            assert not any(row["skipped"] for row in seen["patch"]["rows"])
        logs, alphas = seen["attach"]["logs"], seen["attach"]["alphas"]
        assert len(set(alphas.values())) > 2
        assert {key: value for key, value in logs.items() if key.startswith("mols/alpha/")} == {
            f"mols/alpha/{group}": alpha for group, alpha in alphas.items()
        }


@CASES.parametrize(("world", "stage"), PLACES, reads=lambda value: [(value[0], "resume", value[1])])
def test_load_state_goes_on_bit_for_bit(world: int, stage: int) -> None:
    for seen in runs(world)["resume", stage]:
        assert list(seen["phases"].values()) == ["calibrating", "ramping", "fixed"]
        for stop, resumed in seen["resumed"].items():
            assert resumed == seen["whole"], stop


@CASES.reads((1, "refusals"))
def test_what_is_no_engine_is_refused_by_what_to_pass() -> None:
    (seen,) = runs(1)["refusals",]
    assert 'no "mols" section' in seen["engine"]
    assert seen["optimizer"] == "attach: an optimizer does not know its engine; pass the model that prepare() returned"
    assert "LlamaForCausalLM is not a DeepSpeed engine; pass what deepspeed.initialize returned" in seen["model"]
