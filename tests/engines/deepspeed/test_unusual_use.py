"""Legal use that is not in every loop: copies of the module, detach twice, other betas, sparse embeddings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mols_ds.errors import MolsUnsupportedError
from tests.engines.deepspeed.engines import config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.models import PlainLM
from tests.helpers.harness import run_ranks
from tests.helpers.oracle.models import batch

SECTION = {"start": 1, "ramp_end": 9, "samples": 4, "total_steps": 20}


def copies(stage: int) -> tuple[int, bool]:
    """A copy of the module runs, and its passes are no passes of the engine's."""
    torch.manual_seed(0)
    engine = engine_of(config(stage, SECTION, micros=1), PlainLM())
    for iteration in range(2):
        iterate(engine, iteration, 1)
    twin = copy.deepcopy(engine.module)
    twin.train()
    twin(batch(0, 0, 0), batch(0, 0, 0))
    samples, phase = engine.mols.samples, engine.mols.phase
    engine.destroy()
    return samples, phase == "calibrating"


@pytest.mark.parametrize("stage", [0, 2])
def test_the_module_can_be_copied(stage: int) -> None:
    assert run_ranks(copies, 1, stage) == [(1, True)]


def detached_twice() -> bool:
    engine = engine_of(config(1, SECTION), PlainLM())
    mols = engine.mols
    mols.detach()
    mols.detach()
    iterate(engine, 0)
    return hasattr(engine, "mols")


def test_detach_twice_is_once() -> None:
    assert run_ranks(detached_twice, 1) == [False]


def refused(mode: str, optimizer: Any, sparse: bool) -> str:
    model = PlainLM()
    if sparse:
        model.embed_tokens = nn.Embedding(97, model.embed_tokens.embedding_dim, sparse=True)
    with pytest.raises(MolsUnsupportedError) as error:
        engine_of(config(0, {**SECTION, "mode": mode}), model, optimizer)
    return str(error.value)


def two_betas(parameters: Any) -> torch.optim.Optimizer:
    first, *others = parameters
    return torch.optim.AdamW([{"params": [first], "betas": (0.5, 0.9)}, {"params": others}])


def test_mode_moments_with_other_betas_in_a_group() -> None:
    (said,) = run_ranks(refused, 1, "moments", two_betas, False)
    assert 'mode "moments" with other betas in one parameter group' in said


def test_sparse_embeddings() -> None:
    (said,) = run_ranks(refused, 1, "probe", None, True)
    assert "sparse gradients (an embedding with sparse=True)" in said


def hooked(stage: int) -> list[float]:
    """Rates after each step, where a step pre-hook that was registered after attach halves them."""
    fixed = {"fixed_alphas": {"embedding": 3.0}, "start": 0, "ramp_end": 0}
    engine = engine_of(config(stage, fixed, micros=1), PlainLM(), lambda p: torch.optim.SGD(p, lr=0.5))
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)

    def halve(optimizer: torch.optim.Optimizer, *_: object) -> None:
        optimizer.param_groups[0]["lr"] /= 2

    inner.register_step_pre_hook(halve)
    seen = []
    for iteration in range(3):
        iterate(engine, iteration, 1)
        seen.append(inner.param_groups[0]["lr"])
    return seen


@pytest.mark.parametrize("stage", [0, 2])
def test_step_hooks_of_the_user_see_their_own_groups(stage: int) -> None:
    assert run_ranks(hooked, 1, stage) == [[0.25, 0.125, 0.0625]]
