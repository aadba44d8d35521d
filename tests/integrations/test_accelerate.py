"""Accelerate beside the table: `mols_ds.patch()` before `prepare`, steps that are skipped, and refusals."""

from __future__ import annotations

from typing import Any

import pytest

import mols_ds
from mols_ds.integrations.accelerate import attach
from tests.integrations.accelerate_loop import Loop, train
from tests.integrations.own_loop import WINDOW
from tests.integrations.runner import Case, results, table
from tests.integrations.runs import SECTION, Run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(3600)]

HERE = "test_accelerate"


def ways(stage: int) -> dict[str, Any]:
    return {how: train(Run(stage, {}, how), how) for how in ("attach", "patch", "both")}


def refusals() -> dict[str, str]:
    loop, found = Loop(Run(2, None, "stock"), "attach"), {}
    things = {"engine": loop.engine, "optimizer": loop.optimizer, "model": loop.engine.module}
    for name, thing in things.items():
        with pytest.raises(mols_ds.MolsConfigError) as raised:
            attach(thing, None if name == "engine" else SECTION)
        found[name] = str(raised.value)
    with pytest.raises(mols_ds.MolsConfigError) as raised:
        attach(loop.engine, SECTION, total_steps=0)
    return {**found, "no steps": str(raised.value)}


WAYS: list[Case] = [(world, f"{HERE}:ways", stage) for world, stage in ((1, 0), (2, 2), (1, 3))]
REFUSALS: Case = (1, f"{HERE}:refusals")
CASES = table([*WAYS, REFUSALS])


@CASES.parametrize(("world", "name", "stage"), WAYS, reads=lambda case: [case])
def test_patch_does_the_same_and_attach_adopts_its_engine(world: int, name: str, stage: int) -> None:
    """A discarded step is a skipped one, for which the schedule waits."""
    for seen in results(world)[name, stage]:
        assert seen["attach"]["skipped"] == list(WINDOW)
        assert seen["both"] == seen["attach"]
        # nothing of stage 0 in fp32 can say that a step was skipped, unless attach is given the optimizer
        assert seen["patch"]["skipped"] == ([] if stage == 0 else list(WINDOW))
        assert stage == 0 or seen["patch"] == seen["attach"]
        assert len(set(seen["attach"]["alphas"].values())) > 2


@CASES.reads(REFUSALS)
def test_what_is_no_engine_is_refused_by_what_to_pass() -> None:
    (seen,) = results(1)[REFUSALS[1:]]
    assert 'no "mols" section' in seen["engine"]
    assert (
        seen["optimizer"]
        == "attach: an optimizer has no reference to its engine; pass the model that prepare() returned"
    )
    assert "total_steps" in seen["no steps"] and "greater than or equal to 1" in seen["no steps"]
    assert "LlamaForCausalLM is not a DeepSpeed engine; pass what deepspeed.initialize returned" in seen["model"]
