"""Mistakes of a loop on plain torch, and what MoLS does not support, are errors that name them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import mols_ds
from mols_ds.errors import MolsConfigError, MolsError, MolsUnsupportedError
from tests.engines.torch.models import SECTION, STEPS, adamw, halves, tiny, tokens
from tests.helpers.digests import caught


def window(loop: Callable[[nn.Module, torch.optim.Optimizer, Any], None], **attach: Any) -> str:
    """The error of a loop inside of a window that is open from the start."""
    model = tiny()
    optimizer = adamw(model.parameters())
    section = {**SECTION, "mode": "online", "start": 0}
    mols = mols_ds.attach(optimizer, model, section, total_steps=STEPS, **attach)
    with pytest.raises(MolsError) as error:
        for iteration in range(3):
            model(tokens(iteration)).backward()
            loop(model, optimizer, mols)
    return str(error.value)


def test_gradients_that_changed_before_the_step_are_an_error() -> None:
    def clip(model: nn.Module, optimizer: Any, mols: Any) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()

    def replace(model: nn.Module, optimizer: Any, mols: Any) -> None:
        for p in model.parameters():
            p.grad = p.grad * 0.5
        optimizer.step()

    def unscaled_and_clipped(model: nn.Module, optimizer: Any, mols: Any) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(model(tokens(0))).backward()
        scaler.unscale_(optimizer)
        clip(model, optimizer, mols)

    for loop in (clip, replace, unscaled_and_clipped):
        said = window(loop)
        assert "the gradients changed between the backward pass and optimizer.step()" in said
        assert "call mols.read_gradients() after the backward pass and before you clip" in said
        assert "pass it to mols_ds.attach" in said


def test_gradients_of_no_backward_pass_are_an_error() -> None:
    def by_hand(model: nn.Module, optimizer: Any, mols: Any) -> None:
        optimizer.step()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    assert "no backward pass was seen since the last step" in window(by_hand)


def test_reading_twice_or_too_early_is_an_error() -> None:
    def twice(model: nn.Module, optimizer: Any, mols: Any) -> None:
        mols.read_gradients()
        mols.read_gradients()  # the same gradients: once
        model(tokens(5)).backward()
        mols.read_gradients()

    def early(model: nn.Module, optimizer: Any, mols: Any) -> None:
        mols.read_gradients()
        model(tokens(5)).backward()
        optimizer.step()

    assert "called again before optimizer.step()" in window(twice)
    assert "a backward pass ran between mols.read_gradients() and optimizer.step()" in window(early)


def test_a_scaler_that_attach_does_not_know_is_an_error() -> None:
    def early(model: nn.Module, optimizer: Any, mols: Any) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(model(tokens(0))).backward()
        mols.read_gradients()
        scaler.step(optimizer)

    assert "a GradScaler calls optimizer.step(), and mols.read_gradients() may have read scaled" in window(early)


def test_gradients_of_two_optimizers_are_unscaled_both_or_neither() -> None:
    model, scaler = tiny(), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizers = [adamw(half) for half in halves(model)]
    mols = mols_ds.attach(optimizers, model, {**SECTION, "start": 0}, total_steps=STEPS, grad_scaler=scaler)
    scaler.scale(model(tokens(0))).backward()
    scaler.unscale_(optimizers[0])
    with pytest.raises(MolsError, match="GradScaler has unscaled some of the optimizers only"):
        mols.read_gradients()


def test_a_step_inside_of_a_backward_pass_is_an_error() -> None:
    model = tiny()
    optimizer = adamw(model.parameters())
    mols_ds.attach(optimizer, model, SECTION, total_steps=STEPS)
    model.q_proj.weight.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    with pytest.raises(MolsError, match="inside of a backward pass"):
        model(tokens(0)).backward()


def _sparse() -> nn.Module:
    model = tiny()
    model.embed_tokens = nn.Embedding(31, 12, sparse=True)
    return model


REFUSED: list[tuple[Callable[[], tuple[Any, Any]], type[Exception], str]] = [
    (lambda: (adamw(tiny().parameters()), tiny()), MolsConfigError, "no trainable parameter of this model"),
    (lambda: ("AdamW", tiny()), MolsConfigError, "str is not a torch optimizer"),
    (lambda: ([], tiny()), MolsConfigError, "is not a torch optimizer, a list of them"),
    (lambda: _with(torch.optim.LBFGS), MolsUnsupportedError, "LBFGS"),
    (lambda: _with(torch.optim.AdamW, capturable=True), MolsUnsupportedError, "capturable=True"),
    (lambda: _with(lamb), MolsUnsupportedError, "use it with mols_ds.initialize"),
    (lambda: (adamw((model := _sparse()).parameters()), model), MolsUnsupportedError, "sparse=True"),
    (lambda: (adamw((model := tiny()).parameters()), nn.DataParallel(model)), MolsUnsupportedError, "nn.DataParallel"),
    (
        lambda: (adamw((model := tiny().to("meta")).parameters()), model),
        MolsUnsupportedError,
        "call attach after to_emp",
    ),
    (
        lambda: ([one := adamw((model := tiny()).parameters()), one], model),
        MolsUnsupportedError,
        "in several of the op",
    ),
]


def _with(kind: Any, **more: Any) -> tuple[Any, Any]:
    model = tiny()
    return kind(model.parameters(), **more), model


def lamb(params: Any) -> torch.optim.Optimizer:
    from mols_ds.optim.lamb import ShardedLamb

    return ShardedLamb(params, lr=1e-3)


@pytest.mark.parametrize(("make", "kind", "text"), REFUSED, ids=[text for _, _, text in REFUSED])
def test_what_is_refused_is_named(make: Callable[[], tuple[Any, Any]], kind: type[Exception], text: str) -> None:
    optimizer, model = make()
    with pytest.raises(kind, match=text.replace("(", r"\(").replace(".", r"\.")):
        mols_ds.attach(optimizer, model, SECTION, total_steps=STEPS)
    for one in optimizer if isinstance(optimizer, list) else [optimizer]:
        assert not hasattr(one, "mols") and "step" not in getattr(one, "__dict__", {})


def test_arguments_that_are_mixed_up() -> None:
    model = tiny()
    optimizer = adamw(model.parameters())
    with pytest.raises(MolsConfigError, match="the model is a dict"):
        mols_ds.attach(optimizer, SECTION, SECTION)
    with pytest.raises(MolsConfigError, match='no "mols" section'):
        mols_ds.attach(optimizer, model)
    with pytest.raises(MolsConfigError, match="total_steps"):
        mols_ds.attach(optimizer, model, {"start": 0.1})
    with pytest.raises(MolsConfigError, match="an optimizer needs its model too"):
        mols_ds.attach(optimizer, SECTION, total_steps=STEPS)
    with pytest.raises(MolsConfigError, match="total_steps and grad_scaler are for torch optimizers"):
        mols_ds.attach(model, SECTION, total_steps=STEPS)
    for wrong in (0, -1, "10", 1.5, True, float("nan"), 10**400):
        with pytest.raises(MolsConfigError, match="total_steps"):
            mols_ds.attach(optimizer, model, SECTION, total_steps=wrong)  # type: ignore[arg-type]
    with pytest.raises(MolsConfigError, match=r'total_steps is 8, and "mols.total_steps" 9: give one'):
        mols_ds.attach(optimizer, model, {**SECTION, "total_steps": 9}, total_steps=STEPS)
    with pytest.raises(MolsConfigError, match="grad_scaler is a str"):
        mols_ds.attach(optimizer, model, SECTION, total_steps=STEPS, grad_scaler="on")  # type: ignore[arg-type]
    assert not hasattr(optimizer, "mols")


def test_a_decay_that_cannot_be_unscaled_is_refused() -> None:
    """SGD's decay is in its gradient, which momentum then adds up."""
    model = tiny()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(MolsUnsupportedError, match='"weight_decay": "unscaled" with SGD'):
        mols_ds.attach(sgd, model, {**SECTION, "weight_decay": "unscaled"}, total_steps=STEPS)


def test_parameters_outside_of_the_optimizer_are_named() -> None:
    model = tiny()
    with caught() as said:
        mols = mols_ds.attach(adamw(model.q_proj.parameters()), model, {**SECTION, "reference": "qk"})
    assert any("are not in the optimizer and stay unscaled" in line for line in said)
    assert list(mols.controller.groups) == ["qk"]


def test_a_step_that_makes_state_for_a_checkpoint_does_not_count() -> None:
    """`get_optimizer_state_dict` steps at rate 0 before the first step; here it would be measured and discarded."""
    model = tiny()
    optimizer = adamw(model.parameters())
    mols = mols_ds.attach(optimizer, model, {**SECTION, "start": 0}, total_steps=STEPS)
    state = get_optimizer_state_dict(model, optimizer)
    assert len(optimizer.state) == len(list(model.parameters())) and len(state["state"]) == len(optimizer.state)
    assert mols.samples == 0 and mols.steps == 0
