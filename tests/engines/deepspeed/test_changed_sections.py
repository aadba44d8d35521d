"""A run resumed with another "mols" section, or with MoLS off: the values that apply, and the messages."""

from __future__ import annotations

import functools
from typing import Any

import deepspeed

from mols_ds.core.config import MolsConfig
from mols_ds.errors import MolsCheckpointError
from tests.engines.deepspeed.resume import engine_part, iterate_tiny, section, tiny_engine, until
from tests.helpers.digests import caught, differing
from tests.helpers.harness import Results, run_cases
from tests.helpers.section_changes import CHANGES, problem
from tests.helpers.tiers import Cases

WORLD, OFF_STEPS = 2, 2


def alphas_set(mols: Any) -> bool:
    return mols.phase == "ramping" and mols.multipliers.get("mlp", 1.0) != 1.0


def changed(stage: int) -> list[str]:
    """On each rank: errors in the messages about each key."""
    wrong, folder = [], f"changed-{stage}"
    engine = tiny_engine(stage, section())
    until(engine, 0, alphas_set)
    engine.save_checkpoint(folder, tag="ramping")
    engine.destroy()
    for key, (value, _) in CHANGES.items():
        engine, logged, error = tiny_engine(stage, {**section(), key: value}), list[str](), ""
        if engine.mols.phase != "disabled":
            engine.mols.controller.context.log = logged.append
            engine.mols.controller.context.rank = 0  # print on each rank here
        with caught() as warned:
            try:
                engine.load_checkpoint(folder, tag="ramping")
            except MolsCheckpointError as found:
                error = str(found)
        wrong.append(problem(key, warned, logged, error))
        engine.destroy()
    return [line for line in wrong if line]


def switched(stage: int, way: str) -> dict[str, Any]:
    """On each rank: on, off (`way`: how), on again."""
    folder, found = f"switched-{stage}-{way}", dict[str, Any]()
    engine = tiny_engine(stage, section())
    number = until(engine, 0, alphas_set)
    alphas, at = engine.mols.alphas, engine.global_steps
    engine.save_checkpoint(folder, tag="on", client_state={"mine": 1})
    engine.destroy()

    def train(off: Any) -> dict[str, Any]:
        for iteration in range(number, number + OFF_STEPS):
            iterate_tiny(off, iteration)
        return engine_part(off)

    engine = tiny_engine(stage, None, initialize=deepspeed.initialize)
    engine.load_checkpoint(folder, tag="on")
    stock = train(engine)
    engine.destroy()
    engine = tiny_engine(stage, {**section(), "enabled": False} if way == "disabled" else None)
    with caught() as found["off"]:
        _, client = engine.load_checkpoint(folder, tag="on")
    found["client"] = {key: client.get(key) for key in ("mine", "mols")}
    found["differs"] = differing(stock, train(engine))
    engine.save_checkpoint(folder, tag="off", client_state={"mine": client["mine"]})
    engine.destroy()
    engine = tiny_engine(stage, {**section(), "enabled": False})
    with caught() as found["still off"]:
        engine.load_checkpoint(folder, tag="off")
    engine.save_checkpoint(folder, tag="still off")
    engine.destroy()
    engine = tiny_engine(stage, section())
    with caught() as found["on"]:
        engine.load_checkpoint(folder, tag="still off")
    found["alphas"] = (alphas, engine.mols.alphas, engine.mols.phase)
    iterate_tiny(engine, number + OFF_STEPS)
    found["multipliers"] = engine.mols.multipliers
    found["steps"] = (at, engine.global_steps - 1)
    engine.mols.detach()
    with caught() as found["detached"]:
        engine.load_checkpoint(folder, tag="on")
    engine.destroy()
    return found


def half_done(stage: int) -> dict[str, Any]:
    """On each rank: switch off during a calibration, which drops its accumulators, and on again."""
    folder = f"half-{stage}"
    engine = tiny_engine(stage, section("online"))
    until(engine, 0, lambda mols: mols.samples == 3)
    engine.save_checkpoint(folder, tag="half")
    engine.destroy()
    engine = tiny_engine(stage, {"enabled": False})
    with caught() as off:
        engine.load_checkpoint(folder, tag="half")
    engine.save_checkpoint(folder, tag="off")
    engine.destroy()
    engine = tiny_engine(stage, section("online"))
    with caught() as on:
        engine.load_checkpoint(folder, tag="off")
    phase = (engine.mols.phase, engine.mols.samples)
    until(engine, 9, lambda mols: bool(mols.alphas))
    engine.destroy()
    return {"off": off, "on": on, "phase": phase}


def work(kind: str, *arguments: Any) -> Any:
    return {"changed": changed, "switched": switched, "half done": half_done}[kind](*arguments)


SWITCHED = [(0, "disabled"), (1, "no section"), (2, "disabled"), (3, "no section")]
CASES = Cases(
    [*(("changed", stage) for stage in (0, 3)), *(("switched", *case) for case in SWITCHED), ("half done", 2)],
    quick=[("switched", 2, "disabled")],
)


@functools.cache
def outcomes() -> Results:
    return run_cases(work, WORLD, CASES.wanted, timeout=200)


def test_every_key_has_a_change() -> None:
    assert CHANGES.keys() == MolsConfig.model_fields.keys()


@CASES.parametrize(("kind", "stage"), [("changed", 0), ("changed", 3)])
def test_every_key_of_the_section(kind: str, stage: int) -> None:
    for found in outcomes()[kind, stage]:
        assert found == []


@CASES.parametrize(("kind", "stage", "way"), [("switched", *case) for case in SWITCHED])
def test_off_and_on_again(kind: str, stage: int, way: str) -> None:
    for found in outcomes()[kind, stage, way]:
        assert found["differs"] == [], "off is stock, bit for bit"
        (said,) = found["off"]
        assert "saved with MoLS (phase ramping, alphas {" in said and "base rate" in said and "\n" not in said
        assert found["client"] == {"mine": 1, "mols": None}
        assert len(found["still off"]) == 1
        before, after, phase = found["alphas"]
        assert after == before and phase in ("ramping", "fixed")
        assert found["multipliers"]["mlp"] != 1.0
        since, now = found["steps"]
        assert any(f"off from step {since} to step {now}" in line for line in found["on"]), found["on"]
        assert found["detached"] == [], "a detached engine is stock"


@CASES.reads(("half done", 2))
def test_off_in_the_middle_of_a_calibration() -> None:
    for rank, found in enumerate(outcomes()["half done", 2]):
        assert "phase calibrating, alphas not set" in found["off"][0]
        assert found["phase"] == ("calibrating", 0)
        assert rank or any("starts over" in line for line in found["on"])
