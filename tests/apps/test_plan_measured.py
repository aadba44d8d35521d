"""`mols-ds plan` against real engines: a rank's bytes of each kind in memory and in messages, within 5 %."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.apps import plan_measure_megatron as megatron
from tests.apps.plan_measure import CASES as every
from tests.apps.plan_measure import TOLERANCE, WORLD, Case, largest, measure, planned, rows
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

CASES: Cases[Case] = Cases(
    [case for case in every if case[2] not in ("overlap", "fp32 sums")],
    full=[
        *((0, "bf16", ""), (1, "fp32", ""), (1, "bf16", ""), (2, "fp32", "")),
        *((2, "bf16", "offload"), (3, "fp32", ""), (3, "bf16", "release")),
    ],
)
GRIDS = Cases(
    [name for name in megatron.GRIDS if "attention" not in name],
    full=["tp2 dp2", "pp2 dp2 recomputed", "pp2 dp2 plain fp32"],
)
"""The others of plan_measure.CASES and of megatron.GRIDS are in the table of docs/evidence/planning.md."""


@functools.cache
def engines() -> Results:
    return run_cases(measure, WORLD, CASES.wanted, timeout=120)


@functools.cache
def grids() -> Results:
    return run_cases(megatron.measure, megatron.WORLD, [(name,) for name in GRIDS.wanted], timeout=120)


def compare(plan: dict[str, Any], outcomes: list[dict[str, Any]]) -> None:
    seen = largest(outcomes)
    wrong = [
        f"{part} {kind}: planned {said:,}, measured {found:,}"
        for part, kind, said, found in rows(plan, seen)
        if abs(said - found) > TOLERANCE * found
    ]
    assert not wrong, "; ".join(wrong)


@CASES.parametrize("case", ids=str)
def test_deepspeed(case: Case) -> None:
    compare(planned(case), engines()[case])


@CASES.parametrize("case", ids=str)
def test_accumulators_to_the_byte(case: Case) -> None:
    """`engine.mols.accumulator_bytes` of the rank with most elements, without scratch."""
    from mols_ds.apps.plan.calibration import accumulators

    outcomes = engines()[case]
    elements = max(outcome["nbytes"] for outcome in outcomes) // 8
    plan, own = planned(case)["held"]["accumulators"], accumulators(elements, "cpu")
    assert abs(plan - own.kept - own.scratch) <= 0.01 * plan


@GRIDS.parametrize("name")
def test_megatron(name: str) -> None:
    """Layers are Megatron's own, which the plan traces; Transformer Engine's need a GPU."""
    for stage in range(megatron.GRIDS[name].pp):
        outcomes = [outcome for outcome in grids()[name,] if outcome["stage"] == stage]
        plan = megatron.planned(name, stage)
        assert all(outcome["names"] == plan["names"] for outcome in outcomes), "the real model's parameters, in order"
        compare(plan, outcomes)
