"""MoLS state in Megatron's checkpoints: a run resumed in the same layout continues bit for bit."""

from __future__ import annotations

import copy
import functools
import math
import zlib
from typing import Any

from megatron_patches.cpu.emulation import cpu_megatron
from mols_ds.errors import MolsCheckpointError
from tests.engines.megatron.building import Setup
from tests.engines.megatron.checkpoints import read
from tests.engines.megatron.running import SECTION, Run
from tests.helpers.digests import caught, differing
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

WORLD, ITERATIONS, FOLLOWED = 2, 14, 3
FULLY, BY_RANK = "fully_reshardable", "dp_reshardable"
POINTS = {  # where to save: (phase, usable samples)
    "waiting": ("waiting", 0),
    "calibrating": ("calibrating", 2),
    "ramping": ("ramping", 4),
    "fixed": ("fixed", 4),
}


def small(**more: Any) -> Setup:
    """Two micro-batches on a rank: enough to accumulate."""
    return Setup(micro_batches=2 if more.get("tp", 1) * more.get("pp", 1) == WORLD else 4, **more)


# BY_RANK with 16-bit weights: of fp32 ones megatron-core 0.16.1 writes into a leaf that requires a gradient.
CASES = {
    "TP2": (small(tp=2), FULLY, "probe", "attach"),
    "DP2, by rank": (small(dtype="bfloat16"), BY_RANK, "probe", "apply"),
    "PP2 tied": (small(pp=2, tied=True), FULLY, "moments", "attach"),
    "PP2 interleaved": (small(pp=2, vp=2, layers=4), FULLY, "probe", "attach"),
    "EP2": (small(experts=4, ep=2), FULLY, "probe", "apply"),
    "DP2 plain": (small(distributed=False), FULLY, "probe", "attach"),
    "TP2 plain, bf16": (small(tp=2, distributed=False, dtype="bfloat16"), FULLY, "online", "apply"),
    "EP2 plain": (small(experts=4, ep=2, distributed=False), FULLY, "online", "attach"),
}
NAMES = Cases(CASES, quick=["TP2"], full=["PP2 interleaved", "DP2 plain", "EP2 plain"])


def section(mode: str = "probe") -> dict[str, Any]:
    return {**SECTION, "mode": mode}


def trained(
    run: Run, folder: str, kind: str, iterations: int = ITERATIONS
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Train and save at every point. Returns the fingerprint after each iteration, and the iteration of each point."""
    trace: list[dict[str, Any]] = []
    saved: dict[str, int] = {}
    for iteration in range(iterations):
        run.iterate(iteration)
        trace.append(run.fingerprint())
        for point, wanted in POINTS.items():
            if point not in saved and (run.mols.phase, run.mols.samples) == wanted:
                run.save(f"{folder}-{point}", kind)
                saved[point] = iteration
    return trace, saved


def resumed(setup: Setup, kind: str, mode: str, way: str) -> dict[str, Any]:
    """One run that saves at every point, then from each of them a resumed run. Returns point -> what differs."""
    folder = str(zlib.crc32(repr((setup, kind, mode, way)).encode()))
    with cpu_megatron(fused_adam=setup.distributed):
        with Run(setup, section(mode), way) as run:
            trace, saved = trained(run, folder, kind)
            found = {"saving": differing(trace[-1], run.fingerprint())}
            alphas, changed = run.mols.alphas, differing(trace[-2], trace[-1])
        for point, iteration in saved.items():
            with Run(setup, section(mode), way) as run:
                found[point] = run.load(f"{folder}-{point}", kind)
                found[point] += [f"loaded: {key}" for key in differing(trace[iteration], run.fingerprint())]
                for later in range(iteration + 1, min(iteration + 1 + FOLLOWED, ITERATIONS)):
                    run.iterate(later)
                    found[point] += [
                        f"{later - iteration}: {key}" for key in differing(trace[later], run.fingerprint())
                    ]
    return {"found": found, "alphas": alphas, "changed": changed}


@functools.cache
def outcomes() -> Results:
    return run_cases(resumed, WORLD, [CASES[name] for name in NAMES.wanted], timeout=90)


@NAMES.parametrize("name")
def test_resume_continues_bit_for_bit(name: str) -> None:
    for outcome in outcomes()[CASES[name]]:
        assert {point: found for point, found in outcome["found"].items() if found} == {}
        assert set(outcome["found"]) == {"saving", *POINTS}
        assert len(set(outcome["alphas"].values())) > 2, "alphas must mean something"
        assert any(key.startswith("master") for key in outcome["changed"]), "the comparison must see a step"


# --- checkpoints without or with foreign state ------------------------------------------------------


def state_of(run: Run) -> dict[str, Any]:
    mols = run.mols
    return {"phase": mols.phase, "steps": mols.steps, "alphas": mols.alphas, "rates": mols.controller.rates(mols.steps)}


def finite(run: Run) -> bool:
    return all(bool(parameter.isfinite().all()) for chunk in run.built.chunks for parameter in chunk.parameters())


def without_asking() -> dict[str, Any]:
    """Loaded in mid-calibration without resume_from."""
    with cpu_megatron(fused_adam=True):
        with Run(Setup(), section()) as run:
            run.train(0, 4)
            run.save("asked", FULLY)
            before = (run.mols.phase, run.mols.samples)
        with Run(Setup(), section()) as run:
            warned = run.load("asked", FULLY, ask=False)
            return {"before": before, "after": (run.mols.phase, run.mols.samples), "warned": warned}


def in_torch_format() -> dict[str, Any]:
    """Saved in mid-calibration by `optimizer.state_dict()`, as Megatron-LM's --ckpt-format torch does."""
    setup = Setup(distributed=False)
    with cpu_megatron():
        with Run(setup, section()) as run:
            run.train(0, 4)
            state, before = copy.deepcopy(run.optimizer.state_dict()), (run.mols.phase, run.mols.samples)
        with Run(setup, section()) as run, caught() as warned:
            run.optimizer.load_state_dict(state)
            return {"before": before, "after": (run.mols.phase, run.mols.samples), "warned": warned}


def from_stock(distributed: bool) -> dict[str, Any]:
    """A stock checkpoint with MoLS, then the MoLS checkpoint of that run in stock Megatron."""
    setup, folder = Setup(distributed=distributed), f"stock-{distributed}"
    with cpu_megatron(fused_adam=distributed):
        with Run(setup, way="stock") as run:
            run.train(0, 3)
            run.save(folder, FULLY)
            stock = run.fingerprint()
        with Run(setup, section()) as run:
            warned = run.load(folder, FULLY)
            unequal = [key for key in differing(stock, run.fingerprint()) if key in stock]
            steps, phase = run.mols.steps, run.mols.phase
            run.train(3, 9)  # four samples, two updates
            run.save(f"{folder}-mols", FULLY)
            measured, fingerprint = run.mols.alphas, run.fingerprint()
        with Run(setup, way="stock") as run:
            run.load(f"{folder}-mols", FULLY)
            back = [key for key in differing(fingerprint, run.fingerprint()) if key in run.fingerprint()]
            trains = run.iterate(9).successful and finite(run)
    return {
        "warned": warned,
        "unequal": unequal,
        "steps": steps,
        "phase": phase,
        "alphas": measured,
        "back": back,
        "trains": trains,
    }


def foreign(experts: int) -> dict[str, str]:
    """Message for a "mols" entry that MoLS did not write, and whether the run is unchanged."""
    setup, said = Setup(experts=experts, ep=2 if experts else 1, distributed=False), {}
    with cpu_megatron():
        with Run(setup, section()) as run:
            run.train(0, 8)
            run.save(f"foreign-{experts}", FULLY)
        other = Run(setup, section())
        state = read(other.built, other.optimizer, f"foreign-{experts}", FULLY)["optimizer"]
        before = other.fingerprint()
        host = state[0] if experts else state
        good = host["mols"]
        for name, bad in {
            "a number": 3,
            "a dict": {"alpha": 1.0},
            "version": {**good, "version": 99},
            "no state": {key: value for key, value in good.items() if key != "state"},
            "groups": {**good, "groups": {**good["groups"], "vo": 1}},
            "no steps": {key: value for key, value in good.items() if key != "steps"},
        }.items():
            whole = copy.deepcopy(state)
            (whole[0] if experts else whole)["mols"] = bad
            try:
                other.optimizer.load_state_dict(whole)
                said[name] = "loaded"
            except MolsCheckpointError as error:
                said[name] = str(error) if not differing(before, other.fingerprint()) else "changed the run"
        other.optimizer.load_state_dict(state)
        said["good"] = other.mols.phase
        other.close()
    return said


def legacy(setup: Setup) -> dict[str, Any]:
    """`optimizer.state_dict()` of one rank into a new optimizer."""
    with cpu_megatron(fused_adam=setup.distributed):
        with Run(setup, section("online")) as run:
            run.train(0, 7)
            state, saved = copy.deepcopy(run.optimizer.state_dict()), state_of(run)
        with Run(setup, section("online")) as run, caught() as warned:
            run.optimizer.load_state_dict(state)
            return {"saved": saved, "loaded": state_of(run), "warned": warned}


def others(name: str, *arguments: Any) -> Any:
    return globals()[name](*arguments)


LEGACY = [("legacy", Setup(distributed=False)), ("legacy", Setup(distributed=False, experts=4, ep=2))]
OTHERS: Cases[tuple[Any, ...]] = Cases(
    [
        ("without_asking",),
        ("in_torch_format",),
        ("from_stock", True),
        ("from_stock", False),
        ("foreign", 0),
        ("foreign", 4),
        *LEGACY,
    ],
    full=[("from_stock", False), ("foreign", 0), LEGACY[0]],
)


@functools.cache
def other_outcomes() -> Results:
    return run_cases(others, WORLD, OTHERS.wanted, timeout=60)


@OTHERS.reads(("without_asking",))
def test_without_resume_from_a_half_done_calibration_starts_over_with_a_warning() -> None:
    first, second = other_outcomes()["without_asking",]
    assert first["before"] == ("calibrating", 2) and first["after"] == second["after"] == ("calibrating", 0)
    assert "resume_from" in " ".join(first["warned"])


@OTHERS.reads(("in_torch_format",))
def test_a_half_done_calibration_in_the_format_torch_starts_over_and_torch_dist_is_advised() -> None:
    """The accumulators are not in it: asking for them, or `apply`, would not help."""
    first, second = other_outcomes()["in_torch_format",]
    assert first["before"] == ("calibrating", 2) and first["after"] == second["after"] == ("calibrating", 0)
    (said,) = first["warned"]
    assert "--ckpt-format torch)" in said and "torch_dist" in said and "apply()" not in said


@OTHERS.parametrize("distributed", [True, False], reads=lambda distributed: [("from_stock", distributed)])
def test_checkpoints_go_from_stock_to_mols_and_back(distributed: bool) -> None:
    for rank, found in enumerate(other_outcomes()["from_stock", distributed]):
        assert found["unequal"] == [] and found["back"] == []
        assert (found["steps"], found["phase"]) == (3, "calibrating")
        assert bool(found["warned"]) == (rank == 0) and "no MoLS state" in " ".join(
            found["warned"] or ["no MoLS state"]
        )
        assert found["trains"] and all(math.isfinite(alpha) for alpha in found["alphas"].values()) and found["alphas"]


@OTHERS.parametrize("experts", [0, 4], reads=lambda experts: [("foreign", experts)])
def test_foreign_state_is_refused_before_anything_is_loaded(experts: int) -> None:
    for said in other_outcomes()["foreign", experts]:
        assert said.pop("good") == "ramping"
        for name, text in said.items():
            assert "checkpoint" in text or "MoLS state of version 99" in text, (name, text)


@OTHERS.parametrize("case", LEGACY, ids=lambda case: "experts" if case[1].experts else "dense")
def test_the_state_dict_of_one_rank_carries_the_state(case: tuple[Any, ...]) -> None:
    for found in other_outcomes()[case]:
        assert found["saved"]["phase"] == "ramping" and found["loaded"] == found["saved"] and found["warned"] == []
