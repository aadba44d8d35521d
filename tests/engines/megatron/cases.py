"""The grids that are compared with the single-process reference, launched once for all test files that read them."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

from tests.engines.megatron import oracle
from tests.engines.megatron.building import Setup
from tests.engines.megatron.grids import OFF_WAYS, Plan, tiny, work
from tests.engines.megatron.oracle import Truth
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

TIMEOUT = 120.0
MEAN, MEDIAN = Plan(), Plan(estimator="median")
POOLED, DAMPING = Plan(estimator="pooled", corrected=True), Plan(estimator="damping", corrected=True)
MOMENTS = Plan(mode="moments", samples=10, ramp_end=16)
BF16 = Plan(start=0, updates=1, warmup=0, ramp_end=4)  # at the initial weights: rounded ones would hide the gradients


class Case(NamedTuple):
    world: int
    setup: Setup
    plan: Plan


def _named(*rows: tuple[str, int, Setup, Plan]) -> dict[str, Case]:
    cases = {name: Case(world, setup, plan) for name, world, setup, plan in rows}
    assert len(cases) == len(rows)
    return cases


def dealt(**more: Any) -> Setup:
    """Twice the micro-batches, so that two data-parallel ranks accumulate too."""
    return tiny(micro_batches=4, **more)


def experts(**more: Any) -> Setup:
    return dealt(experts=4, **more)


def _untied() -> dict[str, Case]:
    return _named(
        ("1", 1, tiny(), MEAN),
        ("1 plain", 1, tiny(distributed=False), DAMPING),
        ("tp2", 2, tiny(tp=2), DAMPING),
        ("tp2 plain", 2, tiny(tp=2, distributed=False), MEDIAN),
        ("tp2 sp", 2, tiny(tp=2, sp=True), MEAN),
        ("tp2, one query group", 2, tiny(tp=2, kv_groups=1), MEAN),
        ("tp2 sp, biases", 2, tiny(tp=2, sp=True, bias=True), MEAN),
        ("tp2 plain, output gate", 2, tiny(tp=2, distributed=False, gate=True, qk_norm=True, position="learned"), MEAN),
        ("pp2", 2, tiny(pp=2), MEDIAN),
        ("pp2 plain", 2, tiny(pp=2, distributed=False), MEAN),
        ("pp2 vp2", 2, tiny(pp=2, vp=2), DAMPING),
        ("dp2", 2, dealt(), DAMPING),
        ("dp2 plain", 2, dealt(distributed=False), MEDIAN),
        ("tp2 pp2", 4, tiny(tp=2, pp=2), MEAN),
        ("tp2 pp2 sp plain", 4, tiny(tp=2, pp=2, sp=True, distributed=False), DAMPING),
        ("tp2 dp2", 4, dealt(tp=2), MEDIAN),
        ("tp2 dp2 plain", 4, dealt(tp=2, distributed=False), DAMPING),
        ("pp2 dp2", 4, dealt(pp=2), DAMPING),
        ("dp4 in 2 instances", 4, dealt(instances=2), DAMPING),
    )


def _tied() -> dict[str, Case]:
    return _named(
        ("1 tied", 1, tiny(tied=True), POOLED),
        ("tp2 tied", 2, tiny(tp=2, tied=True), POOLED),
        ("pp2 tied", 2, tiny(pp=2, tied=True), POOLED),
        ("dp2 tied plain", 2, dealt(tied=True, distributed=False), POOLED),
        ("tp2 pp2 tied", 4, tiny(tp=2, pp=2, tied=True), POOLED),
        ("pp2 dp2 tied plain", 4, dealt(pp=2, tied=True, distributed=False), POOLED),
    )


def _experts() -> dict[str, Case]:
    gathered = experts(tp=2, ep=2, sp=True, dispatcher="allgather")
    return _named(
        ("1 experts", 1, experts(), POOLED),
        ("ep2", 2, experts(ep=2), POOLED),
        ("ep2 plain", 2, experts(ep=2, distributed=False), POOLED),
        ("tp2 ep2", 4, gathered, POOLED),
        ("tp2 ep2 plain", 4, replace(gathered, distributed=False), POOLED),
        ("tp2 ep2 etp1", 4, experts(tp=2, ep=2, etp=1, sp=True), POOLED),
    )


GRIDS: dict[str, Case] = _untied() | _tied() | _experts()
"""Statistics and weights are compared on each."""
VARIANTS: dict[str, Case] = _named(
    ("dp2 overlapped", 2, dealt(overlap=True), DAMPING),
    ("tp2 recomputed", 2, tiny(tp=2, sp=True, recompute="full"), MEAN),
    ("pp2 attention recomputed", 2, tiny(pp=2, recompute="core_attn"), MEDIAN),
)
"""As GRIDS, for settings of Megatron that must not change anything."""
OWN_TRAJECTORY: dict[str, Case] = _named(
    ("tp2 online", 2, tiny(tp=2), DAMPING._replace(mode="online")),
    ("pp2 tied plain online", 2, tiny(pp=2, tied=True, distributed=False), MEAN._replace(mode="online")),
    ("dp2 moments", 2, dealt(), MOMENTS._replace(estimator="pooled")),
    ("tp2 plain moments", 2, tiny(tp=2, distributed=False), MOMENTS._replace(estimator="damping")),
)
HALF: dict[str, Case] = _named(
    ("dp2 bf16", 2, dealt(dtype="bfloat16"), BF16),
    ("dp2 bf16 plain", 2, dealt(dtype="bfloat16", distributed=False), BF16),
    ("tp2 bf16", 2, dealt(dtype="bfloat16", tp=2), BF16),
)
ALL: dict[str, Case] = GRIDS | VARIANTS | OWN_TRAJECTORY | HALF
WITHOUT = {"dp2 overlapped": "dp2", "tp2 recomputed": "tp2 sp", "pp2 attention recomputed": "pp2"}
"""Variant -> the grid that it is compared with."""
NAMES = Cases(
    ALL,
    quick=["tp2 sp", "pp2 tied", "dp2", "ep2", "tp2 pp2", "tp2 online", "dp2 moments"],
    full=[
        *("1", "1 tied", "1 experts"),  # of one rank: "1 plain"
        *("tp2", "tp2 plain", "tp2 tied"),  # "tp2 sp", "tp2 plain, output gate", "pp2 tied"
        *("pp2", "pp2 plain", "pp2 attention recomputed"),  # "pp2 vp2", "pp2 tied plain online", "tp2 recomputed"
        "dp2 plain",  # "dp2 tied plain"
        *("tp2 dp2", "tp2 dp2 plain", "tp2 pp2 sp plain"),  # "tp2 pp2", "pp2 dp2", and "dp2 tied plain" of two ranks
        *("tp2 pp2 tied", "pp2 dp2 tied plain"),  # "tp2 pp2", "pp2 dp2", and "pp2 tied" of two ranks
        *("tp2 ep2", "tp2 ep2 plain"),  # "tp2 ep2 etp1", "ep2 plain"
        "dp2 bf16",  # "dp2 bf16 plain", "tp2 bf16"
    ],
    needs=lambda name: [WITHOUT[name]] if name in WITHOUT else [],
)
"""Behind each line of `full`: what covers its kind."""
LATENT: Setup = tiny(tp=2, mla=True, q_lora=True)
OFF_GRIDS: dict[str, Setup] = {
    "tp2 plain": tiny(tp=2, distributed=False),
    "dp2 bf16": tiny(dtype="bfloat16"),
}
OFF = Cases(
    [(grid, way) for grid in OFF_GRIDS for way in ("stock", *OFF_WAYS)],
    quick=[("dp2 bf16", "disabled"), ("tp2 plain", "detached while ramping")],
    full=[("tp2 plain", "disabled"), ("tp2 plain", "detached at once"), ("tp2 plain", "detached while waiting")],
    needs=lambda case: [(case[0], "stock")],
)
LATENTS = Cases([LATENT])
REFERENCE_RUNS: dict[str, tuple[Setup, Plan]] = {
    "mean": (tiny(), MEAN),
    "tilted": (tiny(), MEAN._replace(tilt=1.01)),  # the rate of `vo` is one percent off
    "fp32 at the start": (dealt(), BF16),
}
"""References that a test compares with each other."""
REFERENCE_NAMES = Cases(REFERENCE_RUNS, quick=["mean", "tilted"])


@functools.cache
def _single() -> Results:
    """The references, and the grids of one rank."""
    wanted = [ALL[name] for name in NAMES.wanted]
    references = {("reference", oracle.plain(case.setup), case.plan): None for case in wanted}
    references |= {("reference", *REFERENCE_RUNS[name]): None for name in REFERENCE_NAMES.wanted}
    ours = [("grid", case.setup, case.plan) for case in wanted if case.world == 1]
    return run_cases(oracle.work, 1, [*references, *ours], timeout=TIMEOUT)


@functools.cache
def _launch(world: int) -> Results:
    wanted = [ALL[name] for name in NAMES.wanted]
    cases: list[tuple[Any, ...]] = [("run", case.setup, case.plan) for case in wanted if case.world == world]
    if world == 2:
        cases += [("off", OFF_GRIDS[grid], way) for grid, way in OFF.wanted]
        cases += [("latent", setup) for setup in LATENTS.wanted]
    return run_cases(work, world, cases, timeout=TIMEOUT)


def outcomes(name: str) -> list[dict[str, Any]]:
    """Result of the case on each rank."""
    case = ALL[name]
    if case.world == 1:
        return _single()["grid", case.setup, case.plan]
    return _launch(case.world)["run", case.setup, case.plan]


def others(kind: str, *arguments: Any) -> list[Any]:
    """Result of another kind of case of two ranks on each rank, see `grids.work`."""
    return _launch(2)[kind, *arguments]


def truth(setup: Setup, plan: Plan) -> Truth:
    """The reference of a setup on any grid."""
    found: Truth = _single()["reference", oracle.plain(setup), plan][0]
    return found
