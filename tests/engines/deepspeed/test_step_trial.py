"""Optimizer classes that the catalog does not have: tried out, refused or named in a warning."""

import warnings
from typing import Any

import bitsandbytes
import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mols_ds import MolsUnsupportedError, MolsWarning
from mols_ds.optim import step_trial
from mols_ds.optim.catalog import class_facts
from tests.engines.deepspeed.engines import config, engine_of
from tests.helpers.harness import run_ranks


class Bounded(Optimizer):
    """Signed steps whose rate is bounded: min(lr, 1e-3)."""

    def __init__(self, params: Any, lr: float = 1e-3, bound: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "bound": bound})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                weight.sub_(min(group["lr"], group["bound"]) * weight.grad.sign())


class NeedsMore(Bounded):
    """Cannot be made from its settings."""

    def __init__(self, params: Any, world: object, lr: float = 1e-3) -> None:
        super().__init__(params, lr)


def weights(*sizes: tuple[int, ...]) -> list[Tensor]:
    return [nn.Parameter(torch.randn(size)) for size in sizes or ((6, 4), (4,))]


@pytest.mark.parametrize("name", ["FTRL", "MADGRAD", "Gravity", "AccSGD", "SRMM", "ApolloDQN"])
@pytest.mark.parametrize("flat", [False, True])
def test_not_proportional(name: str, flat: bool) -> None:
    found = step_trial.refusal(getattr(pytorch_optimizer, name)(weights(*[(24,)] * flat), lr=1e-3))
    assert found is not None
    assert name in found[0] and "not proportional to lr" in found[0]


def test_the_settings_of_the_group_count() -> None:
    """With the bound out of reach the same class is proportional."""
    assert step_trial.refusal(Bounded(weights())) is not None
    assert step_trial.refusal(Bounded(weights(), bound=1.0)) is None
    two = [{"params": weights()}, {"params": weights(), "bound": 1e-4}]
    assert step_trial.refusal(Bounded(two, bound=1.0)) is not None


@pytest.mark.parametrize("parent", [Bounded, torch.optim.SGD, torch.optim.AdamW])
def test_a_name_of_the_catalog_is_not_enough(parent: type[Optimizer]) -> None:
    """Somebody else's class that is called AdamW, its own or a subclass of one that is known."""

    @torch.no_grad()
    def step(self: Optimizer, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                weight.sub_(min(group["lr"], 1e-3) * weight.grad.sign())

    own: Any = type("AdamW", (parent,), {"__module__": "elsewhere", "step": step})
    found = step_trial.class_refusal(own(weights(), lr=1e-3))
    assert found is not None and found[0].startswith("AdamW (its step is not proportional")


@pytest.mark.parametrize("name", ["AdaBelief", "AdamP", "Tiger", "Yogi", "AdEMAMix", "ADOPT", "StableAdamW"])
def test_proportional(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step_trial.refusal(getattr(pytorch_optimizer, name)(weights(), lr=1e-3)) is None


def test_a_kernel_without_fp64_is_tried_in_fp32() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step_trial.refusal(bitsandbytes.optim.Lion8bit(weights(), lr=1e-3)) is None


@pytest.mark.parametrize("name", ["Lookahead", "ScheduleFreeWrapper", "TRAC"])
def test_wrappers_are_refused_by_name(name: str) -> None:
    found = class_facts(getattr(pytorch_optimizer, name)(torch.optim.AdamW(weights()))).refusal([])
    assert found is not None
    assert name in found[0]


def test_what_cannot_be_tried_is_named() -> None:
    with pytest.warns(MolsWarning, match="optimizer NeedsMore is not in MoLS' catalog and could not be tested"):
        assert step_trial.refusal(NeedsMore(weights(), object())) is None


def test_the_catalogs_own_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_trial, "_distance", lambda optimizer: pytest.fail("was tried"))
    assert step_trial.refusal(torch.optim.AdamW(weights())) is None
    assert step_trial.refusal(type("Mine", (torch.optim.AdamW,), {})(weights())) is None


def test_nothing_is_left_behind() -> None:
    """The optimizer has its state, groups and weights, and the random state is as before."""
    optimizer = pytorch_optimizer.Yogi(weights(), lr=1e-3)
    before = torch.get_rng_state(), [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    step_trial.refusal(optimizer)
    assert torch.equal(torch.get_rng_state(), before[0]) and not optimizer.state
    assert all(torch.equal(p, w) for p, w in zip(optimizer.param_groups[0]["params"], before[1], strict=True))


def attach(stage: int) -> str:
    """Message of an engine about an optimizer whose step is not proportional to lr."""
    with pytest.raises(MolsUnsupportedError) as error:
        engine_of(config(stage, {"total_steps": 20}), "llama", lambda p: pytorch_optimizer.MADGRAD(p, lr=1e-3))
    return str(error.value)


@pytest.mark.parametrize("stage", [0, 2])
def test_every_rank_of_an_engine_refuses_it(stage: int) -> None:
    for message in run_ranks(attach, 2, stage):
        assert message.startswith("MoLS does not support MADGRAD (its step is not proportional to lr")
