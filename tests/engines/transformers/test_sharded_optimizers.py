"""LAMB, Adam-mini and SGG on whole parameters of tiny models: other people's implementations and slow references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import adam_mini
import numpy as np
import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn

from mols_ds.errors import MolsUnsupportedError
from mols_ds.optim.adam_mini import ShardedAdamMini
from mols_ds.optim.lamb import ShardedLamb
from mols_ds.optim.sgg import SGG
from tests.helpers.oracle.adam_mini import Settings, SlowAdamMini
from tests.helpers.oracle.models import HEADS, HIDDEN, batch, build, groups_of, loss_of
from tests.helpers.oracle.sgg import SlowSGG

STEPS = 5
# Both sides compute in float32, in another order: an ulp of the largest weights (1.2e-7 near 1) a step. Norms and
# means of squares agree to 1e-7 of themselves.
ATOL = 1e-6
MOVED = 1e-3
SLOW = Settings(lr=2e-3, vector_lr=4e-3, decay=0.1)
SGG_SETTINGS: dict[str, Any] = {"clusters": 3, "interval": 2, "beta3": 0.5}
FLIPS = 2  # elements of a model that rounding may put on the other side of a border between two clusters


def groups(model: nn.Module, s: Settings = SLOW) -> list[dict[str, Any]]:
    return groups_of(model, s.lr, s.vector_lr, s.decay)


def adam_options(s: Settings = SLOW) -> dict[str, Any]:
    return {"betas": (s.beta1, s.beta2), "eps": s.eps}


def train(model: nn.Module, step: Callable[[], Any], steps: int = STEPS, first: int = 0) -> nn.Module:
    for iteration in range(first, first + steps):
        model.zero_grad(set_to_none=True)
        loss_of(model, batch(iteration, 0, 0)).backward()
        step()
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def apart(one: nn.Module, other: nn.Module) -> list[float]:
    """Distances of all elements, the largest first."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return sorted((d for a, b in pairs for d in (a - b).detach().abs().view(-1).tolist()), reverse=True)


def assert_same(one: nn.Module, other: nn.Module, start: nn.Module, allowed: int = 0) -> None:
    assert apart(one, start)[len(apart(one, start)) // 2] > MOVED
    assert apart(one, other)[allowed] <= ATOL


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lamb_is_the_librarys(name: str) -> None:
    mine, theirs = build(name), build(name)
    options = {"betas": (0.9, 0.95), "eps": 1e-6}
    optimizer = ShardedLamb(groups(mine, Settings(2e-2, 4e-2, 0.1)), **options)
    other = pytorch_optimizer.Lamb(
        groups(theirs, Settings(2e-2, 4e-2, 0.1)), weight_decouple=False, adam_debias=True, **options
    )
    train(mine, optimizer.step)
    train(theirs, other.step)
    assert_same(mine, theirs, build(name))


def test_adam_mini_is_the_authors() -> None:
    """Their package has one rate, and no decay for norms; LLaMA is the model that its words for names know."""
    mine, theirs = build("llama"), build("llama")
    optimizer = ShardedAdamMini(groups(mine, Settings(2e-3, 2e-3, 0.1)), betas=(0.9, 0.95), eps=1e-4)
    optimizer.bind_model(mine)
    other = adam_mini.Adam_mini(
        theirs.named_parameters(),
        lr=2e-3,
        betas=(0.9, 0.95),
        eps=1e-4,
        weight_decay=0.1,
        dim=HIDDEN,
        n_heads=HEADS,
        verbose=False,
    )
    train(mine, optimizer.step)
    train(theirs, other.step)
    assert_same(mine, theirs, build("llama"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adam_mini_is_the_slow_reference(name: str) -> None:
    mine, slow = build(name), build(name)
    optimizer = ShardedAdamMini(groups(mine), **adam_options())
    optimizer.bind_model(mine)
    reference = SlowAdamMini(slow, SLOW)
    train(mine, optimizer.step)
    train(slow, lambda: reference.step(gradients(slow)))
    assert_same(mine, slow, build(name))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sgg_is_the_slow_reference(name: str) -> None:
    mine, slow = build(name), build(name)
    optimizer = SGG(groups(mine), **adam_options(), **SGG_SETTINGS)
    reference = SlowSGG(slow, SLOW, **SGG_SETTINGS)
    train(mine, optimizer.step)
    train(slow, lambda: reference.step(gradients(slow)))
    assert_same(mine, slow, build(name), FLIPS)
    scales = {name: optimizer.state[p]["scales"][0] for name, p in mine.named_parameters()}
    for name, expected in reference.scales.items():
        np.testing.assert_allclose(scales[name].numpy(), expected, rtol=1e-3)
    assert max(float(s.max()) for s in scales.values()) > 1.5  # factors far from 1, either way
    assert min(float(s.min()) for s in scales.values()) < 0.5


def test_sgg_before_the_first_clusters_is_adamw() -> None:
    mine, theirs = build("llama"), build("llama")
    train(mine, SGG(groups(mine), **adam_options(), interval=STEPS).step)
    train(theirs, torch.optim.AdamW(groups(theirs), **adam_options()).step)
    assert_same(mine, theirs, build("llama"))


def test_adam_mini_keeps_no_state_of_other_blocks() -> None:
    """Stage 0 of DeepSpeed steps once with gradients of zero before `bind`: that leaves nothing to lose."""
    for gradient, error in ((0.0, None), (1.0, MolsUnsupportedError)):
        model = build("gpt2")
        optimizer = ShardedAdamMini(model.parameters())
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        optimizer.step()
        if error is None:
            optimizer.bind_model(model)
            optimizer.step()
        else:
            with pytest.raises(error, match="blocks"):
                optimizer.bind_model(model)
