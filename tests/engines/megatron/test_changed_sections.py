"""A Megatron run resumed with another "mols" section, or with MoLS off: the values that apply, and the messages."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from megatron_patches.cpu.emulation import cpu_megatron
from mols_ds.errors import MolsCheckpointError
from tests.engines.megatron.building import Setup
from tests.engines.megatron.running import SECTION, Run
from tests.engines.megatron.state import everything
from tests.helpers.digests import caught, differing
from tests.helpers.harness import Results, run_cases
from tests.helpers.section_changes import CHANGES, problem
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

WORLD, KIND, SAVED_AT, OFF_STEPS = 2, "fully_reshardable", 8, 3
SETUPS = {"TP2": Setup(tp=2), "EP2": Setup(experts=4, ep=2), "plain": Setup(distributed=False)}


def trained(run: Run, folder: str) -> None:
    """Until the ramp is under way, and saved."""
    run.train(0, SAVED_AT)
    assert run.mols.phase == "ramping" and run.mols.multipliers["mlp"] != 1.0
    run.save(folder, KIND)


def changed(name: str) -> list[str]:
    """On each rank: errors in the messages about each key."""
    wrong, folder = [], f"changed-{name}"
    with cpu_megatron(fused_adam=SETUPS[name].distributed):
        with Run(SETUPS[name], SECTION) as run:
            trained(run, folder)
        for key, (value, _) in CHANGES.items():
            with Run(SETUPS[name], {**SECTION, key: value}) as run:
                logged, warned, error = list[str](), list[str](), ""
                if key != "enabled":
                    run.mols.controller.context.log = logged.append
                    run.mols.controller.context.rank = 0  # print on each rank here
                try:
                    warned = run.load(folder, KIND)
                except MolsCheckpointError as found:
                    error = str(found)
                wrong.append(problem(key, warned, logged, error))
    return [line for line in wrong if line]


def switched(name: str) -> dict[str, Any]:
    """On each rank: on, off, on again."""
    setup, folder, found = SETUPS[name], f"switched-{name}", dict[str, Any]()
    off = {**SECTION, "enabled": False}
    with cpu_megatron(fused_adam=SETUPS[name].distributed):
        with Run(setup, SECTION) as run:
            trained(run, f"{folder}-on")
            alphas, since = run.mols.alphas, run.mols.steps
        prints = []
        for way in ("stock", "attach"):
            with Run(setup, off, way) as run:
                found[way] = run.load(f"{folder}-on", KIND, ask=way == "attach")
                run.train(SAVED_AT, SAVED_AT + OFF_STEPS)
                prints.append(everything(run.built, run.optimizer, run.scheduler))
                if way == "attach":
                    run.save(f"{folder}-off", KIND)
        found["differs"] = differing(*prints)
        with Run(setup, SECTION) as run:
            found["on"] = run.load(f"{folder}-off", KIND)
            found["alphas"] = (alphas, run.mols.alphas)
            found["steps"] = (since, run.mols.steps)
            run.train(SAVED_AT + OFF_STEPS, SAVED_AT + OFF_STEPS + 1)
            found["multipliers"] = run.mols.multipliers
        with Run(setup, off) as run, caught() as found["again"]:
            import megatron_patches

            run.load(f"{folder}-off", KIND)
            mols = megatron_patches.attach(
                run.built.chunks, run.optimizer, run.scheduler, {**SECTION, "start": 90, "ramp_end": 99}
            )
            found["attached"] = mols.phase
            mols.detach()
            found["left"] = sorted(set(vars(run.optimizer)) & {"mols", "state_dict", "load_state_dict"})
    return found


def work(kind: str, name: str) -> Any:
    return {"changed": changed, "switched": switched}[kind](name)


CASES = Cases([("changed", "TP2"), *(("switched", name) for name in SETUPS)], quick=[("switched", "TP2")])


@functools.cache
def outcomes() -> Results:
    return run_cases(work, WORLD, CASES.wanted, timeout=200)


@CASES.reads(("changed", "TP2"))
def test_every_key_of_the_section() -> None:
    for found in outcomes()["changed", "TP2"]:
        assert found == []


@CASES.parametrize(("kind", "name"), [("switched", name) for name in SETUPS])
def test_off_and_on_again(kind: str, name: str) -> None:
    for found in outcomes()[kind, name]:
        assert found["differs"] == [] and found["stock"] == [], "off is stock, bit for bit"
        (said,) = found["attach"]
        assert "saved with MoLS (phase ramping, alphas {" in said and "base rate" in said and "\n" not in said
        before, after = found["alphas"]
        assert before == after and found["multipliers"]["mlp"] != 1.0
        since, now = found["steps"]
        assert now == since + OFF_STEPS, "updates with MoLS off count too"
        assert any(f"off from step {since} to step {now}" in line for line in found["on"]), found["on"]
        assert found["attached"] == "waiting" and found["left"] == []
