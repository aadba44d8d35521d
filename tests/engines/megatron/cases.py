"""The grids that are compared with the single-process twin, launched once for all test files that read them."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

from tests.engines.megatron import oracle
from tests.engines.megatron.building import Setup
from tests.engines.megatron.grids import OFF_WAYS, Plan, tiny, work
from tests.engines.megatron.oracle import Truth
from tests.helpers.harness import Results, run_cases

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
LATENT: Setup = tiny(tp=2, mla=True, q_lora=True)
OFF_GRIDS: dict[str, Setup] = {
    "tp2 plain": tiny(tp=2, distributed=False),
    "dp2 bf16": tiny(dtype="bfloat16"),
}
TILTED = MEAN._replace(tilt=1.01)
"""The twin alone: the rate of `vo` is one percent off."""


@functools.cache
def _single() -> Results:
    """The twins, and the grids of one rank."""
    twins = {("twin", oracle.plain(case.setup), case.plan): None for case in ALL.values()}
    extra = [("twin", tiny(), TILTED), ("twin", dealt(), BF16)]
    ours = [("grid", case.setup, case.plan) for case in ALL.values() if case.world == 1]
    return run_cases(oracle.work, 1, [*twins, *extra, *ours], timeout=TIMEOUT)


@functools.cache
def _launch(world: int) -> Results:
    cases: list[tuple[Any, ...]] = [("run", c.setup, c.plan) for c in ALL.values() if c.world == world]
    if world == 2:
        cases += [("off", setup, way) for setup in OFF_GRIDS.values() for way in ("stock", *OFF_WAYS)]
        cases.append(("latent", LATENT))
    return run_cases(work, world, cases, timeout=TIMEOUT)


def outcomes(name: str) -> list[dict[str, Any]]:
    """What each rank says of the case."""
    case = ALL[name]
    if case.world == 1:
        return _single()["grid", case.setup, case.plan]
    return _launch(case.world)["run", case.setup, case.plan]


def others(kind: str, *arguments: Any) -> list[Any]:
    """What each rank says of another kind of case of two ranks, see `grids.work`."""
    return _launch(2)[kind, *arguments]


def truth(setup: Setup, plan: Plan) -> Truth:
    """The twin of a setup on any grid."""
    found: Truth = _single()["twin", oracle.plain(setup), plan][0]
    return found
