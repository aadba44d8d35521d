"""Megatron checkpoints (torch_dist) that move to another tensor, pipeline, data or expert layout; what cannot move is
refused. docs/checkpoints.md has the table.

One logical model and batch on every grid. What a run on another grid holds is saved again and compared with what was
saved first: both files hold whole tensors, whatever the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_patches.cpu.emulation import cpu_megatron
from mols_ds.errors import MolsCheckpointError
from tests.engines.megatron.building import Setup
from tests.engines.megatron.running import SECTION, Run
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

WORLD, FOLLOWED = 4, 2
FULLY, BY_RANK = "fully_reshardable", "dp_reshardable"
ATOL = 1e-6  # of weights after FOLLOWED steps of about 1e-3: sums in another order
SHORT = {**SECTION, "samples": 3, "ramp_end": 6}
POINTS = {"waiting": 1, "calibrating": 4, "ramping": 6, "fixed": 9}  # point -> iterations before it
PHASES = {"waiting": 0, "calibrating": 2, "ramping": 3, "fixed": 3}  # point -> samples there
ALL, ONE = tuple(POINTS), ("ramping",)


def dense(**more: Any) -> Setup:
    return Setup(**{"micro_batches": 4, "layers": 4, **more})


def experts(**more: Any) -> Setup:
    return Setup(micro_batches=4, experts=4, **more)


def plain(**more: Any) -> Setup:
    return dense(distributed=False, **more)


class Source(NamedTuple):
    """A run whose checkpoints are loaded, saved at `points` of POINTS on its way."""

    setup: Setup
    kind: str = FULLY
    points: tuple[str, ...] = ONE


SOURCES = {
    "TP2PP2": Source(dense(tp=2, pp=2), points=ALL),
    "TP2PP2 tied plain": Source(plain(tp=2, pp=2, tied=True)),
    "EP2": Source(experts(ep=2)),
    "EP1": Source(experts()),
    "TP2 by rank": Source(dense(tp=2, dtype="bfloat16"), BY_RANK),
    "vocabulary of 128": Source(dense(vocab=128)),
}
MOVES: dict[tuple[int, str, str], tuple[Setup, tuple[str, ...]]] = {  # ranks, source, name -> setup, points
    (4, "TP2PP2", "DP4"): (dense(), ("waiting", "calibrating", "ramping")),
    (4, "TP2PP2", "TP4"): (dense(tp=4), ONE),
    (4, "TP2PP2", "PP4"): (dense(pp=4), ONE),
    (4, "TP2PP2", "PP2DP2, interleaved"): (dense(pp=2, vp=2), ONE),
    (4, "TP2PP2 tied plain", "DP4"): (plain(tied=True), ONE),
    (4, "TP2PP2 tied plain", "TP2DP2"): (plain(tp=2, tied=True), ONE),
    (4, "EP2", "EP4"): (experts(ep=4), ONE),
    (4, "EP2", "TP2EP2"): (experts(ep=2, tp=2, sp=True, etp=1), ONE),
    (4, "vocabulary of 128", "TP2, padded to 130"): (dense(tp=2, vocab=130), ONE),
    (2, "TP2PP2", "PP2"): (dense(pp=2), ("calibrating", "ramping", "fixed")),
    (1, "TP2PP2", "one rank"): (dense(), ONE),
}
CASES: Cases[tuple[Any, ...]] = Cases(
    MOVES,
    full=[
        *((4, "TP2PP2", "TP4"), (4, "TP2PP2", "PP4"), (4, "TP2PP2", "PP2DP2, interleaved")),
        *((4, "TP2PP2 tied plain", "TP2DP2"), (4, "EP2", "TP2EP2"), (1, "TP2PP2", "one rank")),
    ],
)
COMPARED_LATER = {
    *((4, "TP2PP2", "DP4"), (4, "TP2PP2 tied plain", "DP4"), (4, "EP2", "EP4"), (2, "TP2PP2", "PP2")),
    (1, "TP2PP2", "one rank"),
}
"""Moves whose weights are compared with the uninterrupted run's again after FOLLOWED iterations."""
BF16 = dense(dtype="bfloat16")
REFUSED: dict[str, tuple[str, str, Setup, str]] = {  # name -> source, way, setup, what is said
    "EP2 to EP1": ("EP2", "attach", experts(), "expert_model_parallel_size 1 and more"),
    "EP1 to EP2": ("EP1", "attach", experts(ep=2), "expert_model_parallel_size 1 and more"),
    "distributed to plain": ("TP2PP2", "attach", plain(), "saved with the distributed optimizer, this run is without"),
    "plain to distributed": ("TP2PP2 tied plain", "apply", dense(tied=True), "saved without the distributed optimizer"),
    "by rank, DP4": ("TP2 by rank", "apply", BF16, "2 tensor- and pipeline-parallel ranks; this run has 1"),
    "by rank, TP2PP2": ("TP2 by rank", "attach", dense(tp=2, pp=2, dtype="bfloat16"), "this run has 4"),
}
REFUSALS = Cases(REFUSED, full=["EP1 to EP2", "by rank, TP2PP2"])


def state_of(run: Run) -> dict[str, Any]:
    mols = run.mols
    return {
        "phase": (mols.phase, mols.samples),
        "steps": mols.steps,
        "alphas": mols.alphas,
        "rates": mols.controller.rates(mols.steps),
    }


def whole(folder: str) -> dict[str, Tensor]:
    """Every weight and moment of a checkpoint, whole. Collective."""
    from megatron.core import dist_checkpointing

    found = dist_checkpointing.load_plain_tensors(folder)
    return {name: value.detach().clone() for name, value in found.items() if isinstance(value, Tensor)}


def save(base: str, name: str) -> dict[str, Any]:
    """On each rank: point -> state of MoLS there, and the tensors then and FOLLOWED iterations later."""
    source, found = SOURCES[name], {}
    with cpu_megatron(fused_adam=source.setup.distributed), Run(source.setup, SHORT) as run:
        iteration = 0
        for point in source.points:
            run.train(iteration, POINTS[point])
            iteration = POINTS[point]
            run.save(f"{base}/{name}-{point}", source.kind)
            found[point] = state_of(run)
            if point == "ramping" and source.kind == FULLY:
                run.train(iteration, iteration + FOLLOWED)
                iteration += FOLLOWED
                run.save(f"{base}/{name}-later", source.kind)
                found["tensors"], found["later"] = whole(f"{base}/{name}-ramping"), whole(f"{base}/{name}-later")
    return found


def load(base: str, name: str, setup: Setup, points: tuple[str, ...], followed: bool) -> dict[str, Any]:
    """On each rank: point -> state of MoLS, warnings and tensors after a load under `setup`; `followed`: later too."""
    found: dict[str, Any] = {}
    for point in points:
        with cpu_megatron(fused_adam=setup.distributed), Run(setup, SHORT) as run:
            warned = run.load(f"{base}/{name}-{point}", FULLY)
            found[point] = {"state": state_of(run), "warned": warned}
            mine = f"{name}-{setup.tp}-{setup.pp}-{setup.ep}-{point}"
            if point in ONE:
                run.save(f"{mine}-now", FULLY)
                found["tensors"] = whole(f"{mine}-now")
            run.train(POINTS[point], POINTS[point] + FOLLOWED)
            found[point]["after"] = state_of(run)
            if point in ONE and followed:
                run.save(f"{mine}-later", FULLY)
                found["later"] = whole(f"{mine}-later")
    return found


def refusal(base: str, name: str, way: str, setup: Setup) -> str:
    """Message of an impossible load."""
    with cpu_megatron(fused_adam=setup.distributed), Run(setup, SHORT, way) as run:
        try:
            run.load(f"{base}/{name}-ramping", SOURCES[name].kind)
        except MolsCheckpointError as error:
            return str(error)
    return "loaded"


def work(what: str, *arguments: Any) -> Any:
    """One case of a launch."""
    return {"save": save, "load": load, "refusal": refusal}[what](*arguments)


Found = tuple[Mapping[str, Any], Mapping[int, Results], str]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Source -> what its first rank knew; number of ranks -> what they found; the folder between them."""
    base = str(tmp_path_factory.mktemp("moves"))
    read = {"TP2PP2", *(source for _, source, _ in CASES.wanted), *(REFUSED[name][0] for name in REFUSALS.wanted)}
    sources = [name for name in SOURCES if name in read]
    cases: dict[int, list[tuple[Any, ...]]] = {WORLD: [("save", base, name) for name in sources], 2: [], 1: []}
    for move in CASES.wanted:
        world, source, _ = move
        cases[world].append(("load", base, source, *MOVES[move], move in COMPARED_LATER))
    for source, way, setup, _ in (REFUSED[name] for name in REFUSALS.wanted):
        cases[WORLD].append(("refusal", base, source, way, setup))
    results = {world: run_cases(work, world, of, timeout=90) for world, of in cases.items()}
    saved = {name: results[WORLD]["save", base, name][0] for name in sources}
    return saved, results, base


@CASES.parametrize("move", ids=str)
def test_weights_and_moments_move_bit_for_bit(found: Found, move: tuple[int, str, str]) -> None:
    saved, results, base = found
    world, source, _ = move
    setup, points = MOVES[move]
    truth = saved[source]
    for seen in results[world]["load", base, source, setup, points, move in COMPARED_LATER]:
        assert seen["tensors"].keys() == truth["tensors"].keys() and len(truth["tensors"]) > 20
        weights = [name for name in truth["later"] if "exp_avg" not in name]
        now = seen["tensors"]
        if setup.vocab != SOURCES[source].setup.vocab:
            cut = {name: slice(0, SOURCES[source].setup.vocab) for name in now if now[name].shape[:1] == (setup.vocab,)}
            assert len(cut) == 8  # embedding and head: two weights, masters and two moments each
            now = {name: values[cut.get(name, ...)] for name, values in now.items()}
        assert [name for name, values in truth["tensors"].items() if not torch.equal(values, now[name])] == []
        for name in weights if move in COMPARED_LATER else []:
            assert float((seen["later"][name] - truth["later"][name]).abs().max()) < ATOL, name
        moved = max(float((truth["later"][name] - truth["tensors"][name]).abs().max()) for name in weights)
        assert moved > 100 * ATOL, "the comparison must see a step"


@CASES.parametrize("move", ids=str)
def test_phase_alphas_and_ramp_go_on(found: Found, move: tuple[int, str, str]) -> None:
    saved, results, base = found
    world, source, _ = move
    setup, points = MOVES[move]
    for rank, seen in enumerate(results[world]["load", base, source, setup, points, move in COMPARED_LATER]):
        for point in points:
            truth, now = saved[source][point], seen[point]
            assert truth["phase"] == (point, PHASES[point])
            if point == "calibrating":
                assert now["state"] == {**truth, "phase": ("calibrating", 0)}
                assert len(now["warned"]) == (rank == 0)
                assert rank or "starts over" in now["warned"][0]
                assert world == WORLD or rank or f"saved by {WORLD} ranks, these are {world}" in now["warned"][0]
            else:
                assert (now["state"], now["warned"]) == (truth, []), point
            if PHASES[point] == SHORT["samples"]:
                assert len(set(truth["alphas"].values())) > 2 and now["after"]["alphas"] == truth["alphas"]
                assert now["after"]["steps"] == truth["steps"] + FOLLOWED
    assert set(saved["TP2PP2"]["ramping"]["rates"].items()) != set(saved["TP2PP2"]["fixed"]["rates"].items())


@REFUSALS.parametrize("name")
def test_what_cannot_move_is_refused_with_the_way_out(found: Found, name: str) -> None:
    _, results, base = found
    source, way, setup, part = REFUSED[name]
    for text in results[WORLD]["refusal", base, source, way, setup]:
        assert part in text and ("resume with" in text or "load the weights alone" in text) and "\n" not in text, text
