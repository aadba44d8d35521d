"""A weight that was frozen after the optimizer was made and before MoLS was attached is neither measured nor scaled."""

from __future__ import annotations

import functools

import pytest

from megatron_patches.cpu.emulation import cpu_megatron
from tests.engines.megatron.building import Setup, attach, build, optimizer, start, step
from tests.engines.megatron.weights import logical_names
from tests.helpers.digests import caught
from tests.helpers.harness import Results, run_cases

pytestmark = pytest.mark.distributed

FROZEN = "output_layer.weight"
KINDS = {
    "FP32Optimizer": Setup(distributed=False, micro_batches=1),
    "Float16OptimizerWithFloat16Params": Setup(distributed=False, micro_batches=1, dtype="bfloat16"),
    "DistributedOptimizer": Setup(micro_batches=1),
}


def frozen_at_attach(kind: str) -> tuple[str, list[str], list[str], list[str]]:
    """Kind of the optimizer, module groups, messages in a step, and after the weight was unfrozen."""
    setup = KINDS[kind]
    with cpu_megatron():
        start(setup)
        built = build(setup)
        chain, scheduler = optimizer(built, init_lr=1e-3)
        weight = logical_names(built.chunks[0], setup)[FROZEN].requires_grad_(False)
        mols = attach(built, chain, scheduler, {"fixed_alphas": {"qk": 0.5}, "start": 0, "ramp_end": 4})
        with caught() as frozen:
            step(built, chain, scheduler, 0)
        weight.requires_grad_(True)
        with caught() as trained:
            step(built, chain, scheduler, 1)
            step(built, chain, scheduler, 2)
        return type(chain.chained_optimizers[0]).__name__, list(mols.controller.groups), frozen, trained


@functools.cache
def runs() -> Results:
    return run_cases(frozen_at_attach, 1, [(kind,) for kind in KINDS])


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_frozen_at_attach_is_left_out(kind: str) -> None:
    """It was refused as a weight of no model chunk. A warning names it when it trains again."""
    ((name, groups, frozen, trained),) = runs()[kind,]
    assert name == kind and "head" not in groups and "qk" in groups and not frozen
    (line,) = trained
    assert line.startswith("1 weights train that were frozen") and FROZEN in line
