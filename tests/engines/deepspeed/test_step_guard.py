"""An optimizer that leaves tensors out on one rank: the run ends on every rank, in the same step."""

from __future__ import annotations

import torch.distributed as dist

from mols_ds.errors import MolsError
from tests.engines.deepspeed.engines import config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.state import step_first_group_only
from tests.helpers.harness import run_ranks
from tests.helpers.oracle.adamw import AdamSettings

SECTION = {"start": 1, "ramp_end": 3, "total_steps": 20, "fixed_alphas": {"embedding": 4.0, "qk": 1.5, "mlp": 1.2}}
STEPS = 8


def train(stage: int, broken_rank: int | None) -> tuple[int, str]:
    """On each rank: steps until the error, and its text; `broken_rank` steps its first parameter group alone."""
    engine = engine_of(config(stage, SECTION), "llama", AdamSettings(lr=1e-3))
    if dist.get_rank() == broken_rank:
        step_first_group_only(engine.mols.shards.inner)
    for iteration in range(STEPS):
        try:
            iterate(engine, iteration)
        except MolsError as error:
            return iteration, str(error)
    return STEPS, ""


def test_a_tensor_left_out_on_one_rank_ends_all_ranks() -> None:
    (step, text), (same_step, other) = run_ranks(train, 2, 1, 1)
    assert step == same_step < STEPS
    assert "see that rank's message" in text
    assert "optimizer AdamW left" in other and "tensors with a gradient" in other


def test_an_ordinary_run_ends() -> None:
    assert run_ranks(train, 2, 3, None) == [(STEPS, "")] * 2
