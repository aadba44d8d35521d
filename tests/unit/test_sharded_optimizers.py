"""LAMB, Adam-mini and SGG on single parameters and flat shards: by hand and by brute force; what they refuse."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mols_ds.core.ranges import ShardRange
from mols_ds.errors import MolsConfigError, MolsUnsupportedError, MolsWarning
from mols_ds.optim.adam_mini import ShardedAdamMini
from mols_ds.optim.lamb import ShardedLamb, lamb_direction
from mols_ds.optim.sgg import SGG

ATOL = 1e-6  # of float32 weights after three steps in another order: an ulp (1.2e-7 near 1) a step


def test_lamb_with_bias_correction_and_without_clamp() -> None:
    """The paper's algorithm 2, for one parameter by hand; its norm is above the default clamp of 10."""
    weight = nn.Parameter(torch.full((30, 20), 1.0))
    optimizer = ShardedLamb([weight], lr=0.1, betas=(0.5, 0.9), weight_decay=0.3, bias_correction=True, clamp=None)
    w, m, v = weight.detach().double().clone(), torch.zeros(30, 20).double(), torch.zeros(30, 20).double()
    for step in range(1, 4):
        g = torch.randn(30, 20, generator=torch.Generator().manual_seed(step))
        weight.grad = g.clone()
        optimizer.step()
        m, v = 0.5 * m + 0.5 * g, 0.9 * v + 0.1 * g * g
        u = lamb_direction(m / (1 - 0.5**step), v / (1 - 0.9**step), w, 1e-6, 0.3)
        w = w - 0.1 * w.norm() / (u.norm() + 1e-6) * u
    torch.testing.assert_close(weight.detach().double(), w, rtol=1e-6, atol=ATOL)


# --------------------------------------------------------------------------------------------- what all have in common

KINDS: dict[str, Callable[[Iterable[Any]], Any]] = {
    "lamb": lambda p: ShardedLamb(p, lr=0.01, weight_decay=0.1),
    "adam_mini": lambda p: ShardedAdamMini(p, lr=0.01, weight_decay=0.1),
    "sgg": lambda p: SGG(p, lr=0.01, weight_decay=0.1, interval=1, beta3=0.2),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def two_parameters() -> tuple[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return nn.Parameter(torch.randn(6, 5, generator=generator)), nn.Parameter(torch.randn(5, generator=generator))


def set_gradients(tensors: Iterable[Tensor], step: int) -> None:
    for number, tensor in enumerate(tensors):
        generator = torch.Generator().manual_seed(100 * step + number)
        tensor.grad = torch.randn(tensor.shape, generator=generator)


@kinds
def test_flat_with_nan_padding_equals_whole_parameters(kind: str) -> None:
    """One flat tensor with both parameters in another order, and NaN padding between them."""
    whole = two_parameters()
    flat = torch.full((50,), torch.nan)
    where = {"a": (9, whole[0]), "b": (1, whole[1])}
    for offset, parameter in where.values():
        flat[offset : offset + parameter.numel()] = parameter.detach().view(-1)
    padding = flat.isnan()
    one, other = KINDS[kind](whole), KINDS[kind]([flat.requires_grad_()])
    pieces = [ShardRange(name, 0, offset, p.numel()) for name, (offset, p) in where.items()]
    other.bind([flat], [pieces], {"a": (6, 5), "b": (5,)})
    for step in range(4):
        set_gradients(whole, step)
        flat.grad = torch.full((50,), torch.nan)
        for offset, parameter in where.values():
            flat.grad[offset : offset + parameter.numel()] = parameter.grad.view(-1)  # type: ignore[union-attr]
        one.step()
        other.step()
    for offset, parameter in where.values():
        assert torch.equal(flat[offset : offset + parameter.numel()], parameter.view(-1))
    assert torch.equal(flat.isnan(), padding)


@kinds
def test_the_step_is_proportional_to_the_rate(kind: str) -> None:
    """What rates per module rely on: half the rate, half the step, to the rounding of a weight."""
    steps = []
    for rate in (0.02, 0.01):
        parameters = two_parameters()
        optimizer = KINDS[kind](parameters)
        for step in range(3):
            before = [p.detach().clone() for p in parameters]
            optimizer.param_groups[0]["lr"] = rate if step == 2 else 0.01
            set_gradients(parameters, step)
            optimizer.step()
        steps.append([p.detach() - old for p, old in zip(parameters, before, strict=True)])
    for double, single in zip(*steps, strict=True):
        torch.testing.assert_close(double, 2 * single, rtol=1e-4, atol=5e-7)
        assert float(single.abs().max()) > 1e-4


@kinds
def test_a_copy_and_a_loaded_state_go_on_bit_for_bit(kind: str) -> None:
    parameters = two_parameters()
    optimizer = KINDS[kind](parameters)
    for step in range(2):
        set_gradients(parameters, step)
        optimizer.step()
    copied = copy.deepcopy(optimizer)
    loaded_parameters = copy.deepcopy(parameters)
    loaded = KINDS[kind](loaded_parameters)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    others = [copied.param_groups[0]["params"], loaded_parameters]
    for step in range(2, 4):
        for tensors, one in ((parameters, optimizer), (others[0], copied), (others[1], loaded)):
            set_gradients(tensors, step)
            one.step()
    for tensors in others:
        for tensor, expected in zip(tensors, parameters, strict=True):
            assert torch.equal(tensor, expected)
    types = [{k: getattr(v, "dtype", None) for k, v in o.state[o.param_groups[0]["params"][0]].items()}
             for o in (optimizer, loaded)]  # fmt: skip
    assert types[0] == types[1]


@kinds
def test_parameters_without_gradient_and_closures(kind: str) -> None:
    used, unused = two_parameters()
    before = unused.detach().clone()
    optimizer = KINDS[kind]([used, unused])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (used**2).sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    assert torch.equal(unused, before)


@kinds
def test_flat_shards_that_nobody_explained_are_refused(kind: str) -> None:
    optimizer = KINDS[kind](two_parameters())
    flat = torch.zeros(35)
    flat.grad = torch.zeros(35)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(MolsUnsupportedError, match="bind_optimizer"):
        optimizer.step()
    optimizer = KINDS[kind]([torch.zeros(4, requires_grad=True)])
    optimizer.bind([torch.zeros(4)], [[ShardRange("a", 0, 0, 4)]], {"a": (4,)})
    set_gradients(optimizer.param_groups[0]["params"], 0)
    with pytest.raises(MolsUnsupportedError, match="not bound to"):
        optimizer.step()


@kinds
def test_half_precision_weights_are_refused(kind: str) -> None:
    weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = KINDS[kind]([weight])
    weight.grad = torch.zeros_like(weight)
    with pytest.raises(MolsUnsupportedError, match="float32 weights"):
        optimizer.step()


def test_pieces_that_do_not_add_up_are_refused() -> None:
    flat = torch.zeros(8)
    optimizer = ShardedLamb([flat])
    for numel, factor in ((7, 1), (8, 2)):  # an element is missing; every element is there twice
        with pytest.raises(MolsUnsupportedError, match="'a', which has 8"):
            optimizer.bind([flat], [[ShardRange("a", 0, 0, numel)]], {"a": (8,)}, reduce=lambda v, f=factor: v * f)
    with pytest.raises(MolsUnsupportedError, match="two ranges"):
        optimizer.bind([flat], [[ShardRange("a", 0, 0, 4), ShardRange("a", 4, 4, 4)]], {"a": (8,)})


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (ShardedLamb, {"lr": -1.0}, "lr=-1.0"),
        (ShardedLamb, {"clamp": 0.0}, "clamp=0.0"),
        (ShardedAdamMini, {"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
        (ShardedAdamMini, {"head_dim": 0}, "head_dim=0"),
        (SGG, {"clusters": 0}, "clusters=0"),
        (SGG, {"interval": 0}, "interval=0"),
        (SGG, {"bounds": (2.0, 10.0)}, "bounds"),
        (SGG, {"eps": math.nan}, "eps=nan"),
    ],
)
def test_wrong_options_are_named(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MolsConfigError, match=message):
        cls([nn.Parameter(torch.zeros(2))], **options)


def test_adam_mini_says_what_it_does_not_know() -> None:
    plain = nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": nn.Linear(4, 4, bias=False)})})
    optimizer = ShardedAdamMini(plain.parameters())
    with pytest.warns(MolsWarning, match="head_dim"):
        optimizer.bind_model(plain)
    ShardedAdamMini(plain.parameters(), head_dim=2).bind_model(plain)
    nameless = nn.ModuleDict({"unknown": nn.Linear(4, 4, bias=False)})
    with pytest.raises(MolsConfigError, match=r"Adam-mini uses the module groups.*unknown\.weight"):
        ShardedAdamMini(nameless.parameters()).bind_model(nameless)
    ShardedAdamMini(nameless.parameters()).bind_model(nameless, [["unknown", "mlp"]])


def test_sgg_says_that_clusters_are_lost_and_refuses_another_number_of_them() -> None:
    parameters = two_parameters()
    adam = torch.optim.AdamW(parameters)
    set_gradients(parameters, 0)
    adam.step()
    optimizer = SGG(parameters, interval=1)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": adam.state_dict()["state"]})
    set_gradients(parameters, 1)
    with pytest.warns(MolsWarning, match="all factors start at 1"):
        optimizer.step()
    assert optimizer.state[parameters[0]]["step"] == 2
    other = SGG(parameters, clusters=2)
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(MolsConfigError, match="number of clusters"):
        other.step()
