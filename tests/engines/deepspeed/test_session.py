"""What one rank alone sees in a probe counts on every rank."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.engines.deepspeed.engines import config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.helpers.harness import run_ranks

pytestmark = pytest.mark.distributed

SECTION = {"start": 0, "ramp_end": 10, "samples": 4, "noise_floor_correction": False}


def bad_on_rank_1(stage: int) -> tuple[int, int]:
    """On each rank: usable samples and skipped ones after one step whose gradient rank 1 alone finds not finite."""
    engine = engine_of(config(stage, SECTION))
    if dist.get_rank() == 1:
        engine.mols.source.finite = lambda: False
    iterate(engine, 0)
    return engine.mols.samples, engine.mols.controller.state.skipped


def test_a_sample_that_one_rank_cannot_use_is_left_out_on_every_rank() -> None:
    assert run_ranks(bad_on_rank_1, 2, 2) == [(0, 1)] * 2
