"""A run resumed with the same number of ranks continues bit for bit, from any phase."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import torch

from tests.engines.deepspeed.resume import EVERY, SAMPLES, fingerprint, iterate_tiny, section, tiny_engine
from tests.helpers.digests import caught, differing
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

WORLD, ITERATIONS, FOLLOWED = 2, 28, 3
POINTS = {  # where to save: (phase, usable samples, whether there are alphas already)
    "waiting": ("waiting", 0, False),
    "window opened": ("calibrating", 0, False),
    "calibrating": ("calibrating", SAMPLES - 1, False),
    "ramping": ("ramping", SAMPLES, True),
    "fixed": ("fixed", SAMPLES, True),
    "recalibrating": ("calibrating", SAMPLES - 3, True),
}
BROKEN = 2  # the iteration whose gradient is not finite, where a case asks for it: the first of the window
MODES = ("probe", "online", "moments")
CASES = Cases(
    [
        *[(stage, "fp32", mode, False) for stage in (0, 1, 3) for mode in MODES],  # 2 is 1, but for when it reduces
        (2, "fp32", "probe", False),
        *[(stage, "bf16", "probe", False) for stage in (0, 2, 3)],
        (3, "bf16", "online", False),
        (1, "bf16 fp32 grads", "probe", False),
        (0, "fp32", "probe", True),
        (3, "fp32", "probe", True),
    ],
    quick=[(0, "fp32", "probe", False), (1, "fp32", "online", False), (3, "fp32", "moments", False)],
    full=[
        *[(0, "fp32", "online", False), (0, "fp32", "moments", False), (1, "fp32", "probe", False)],
        *[(1, "fp32", "moments", False), (2, "fp32", "probe", False), (3, "fp32", "online", False)],
        *[(3, "bf16", "online", False), (0, "fp32", "probe", True)],
    ],
)


def resumed(stage: int, dtype: str, mode: str, broken: bool) -> dict[str, Any]:
    """On each rank: one run that saves at every point, then from each of them a resumed run of FOLLOWED iterations.

    Returns point -> what differs after which iteration, and how the points were loaded.
    """
    mols = section(mode, recalibrate={"every": EVERY})
    folder = f"{stage}-{dtype}-{mode}-{broken}".replace(" ", "-")
    engine = tiny_engine(stage, mols, precision=dtype)
    trace: list[dict[str, Any]] = []
    saved: dict[str, tuple[int, torch.Tensor]] = {}
    at = BROKEN if broken else None
    for iteration in range(ITERATIONS):
        iterate_tiny(engine, iteration, broken=iteration == at)
        trace.append(fingerprint(engine))
        now = (engine.mols.phase, engine.mols.samples, bool(engine.mols.alphas))
        attempts = engine.mols.controller.state.attempts
        for point, wanted in POINTS.items():
            if point not in saved and now == wanted and (point != "window opened" or attempts == int(broken)):
                engine.save_checkpoint(folder, tag=point, client_state={"iteration": iteration})
                saved[point] = (iteration, torch.get_rng_state())
    differences = {"saving": differing(trace[-1], fingerprint(engine))}
    for number, (point, (iteration, random)) in enumerate(saved.items()):
        if stage == 3 or number % 2:
            engine.destroy()
            engine = tiny_engine(stage, mols, precision=dtype)
        torch.manual_seed(77)
        with caught() as warned:
            path, client_state = engine.load_checkpoint(folder, tag=point)
        assert path is not None and client_state["iteration"] == iteration and "mols" not in client_state
        torch.set_rng_state(random)
        differences[point] = follow(engine, iteration, trace, at) + warned
    alphas = trace[-1]["alphas"]
    engine.destroy()
    return {"differences": differences, "alphas": alphas, "changed": differing(trace[-2], trace[-1])}


def follow(engine: Any, iteration: int, trace: list[dict[str, Any]], broken: int | None) -> list[str]:
    """What differs between the trace and a run that was just resumed after `iteration`."""
    # What the last step applied is a fact of that step; a resumed engine knows it from its first step on.
    found = [f"loaded: {key}" for key in differing(trace[iteration], fingerprint(engine), "applied")]
    steps = engine.global_steps
    moments = engine.mols.controller.elements.accumulators
    accumulators = [weakref.ref(moments.mean), weakref.ref(moments.m2)] if moments is not None else []
    del moments
    for later in range(iteration + 1, min(iteration + 1 + FOLLOWED, ITERATIONS)):
        iterate_tiny(engine, later, broken=later == broken)
        leave_out = ("applied",) if engine.global_steps == steps else ()
        found += [f"{later - iteration}: {key}" for key in differing(trace[later], fingerprint(engine), *leave_out)]
    if accumulators and engine.mols.phase != "calibrating":
        gc.collect()
        found += ["accumulators are still held" for ref in accumulators if ref() is not None]
    return found


@functools.cache
def outcomes() -> Results:
    return run_cases(resumed, WORLD, CASES.wanted, timeout=60)


@CASES.parametrize(("stage", "dtype", "mode", "broken"))
def test_resume_continues_bit_for_bit(stage: int, dtype: str, mode: str, broken: bool) -> None:
    for outcome in outcomes()[stage, dtype, mode, broken]:
        assert {point: found for point, found in outcome["differences"].items() if found} == {}
        assert set(outcome["differences"]) == {"saving", *POINTS}
        assert len(set(outcome["alphas"].values())) > 2, "alphas must mean something"
        assert any(key.startswith("master") for key in outcome["changed"]), "the comparison must see a step"
