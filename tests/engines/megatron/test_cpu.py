"""Megatron-core on CPU and gloo: all grids have one model, the context leaves no trace, its Adam is torch's."""

from __future__ import annotations

import copy
import importlib
import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_patches.cpu.adam import CpuFusedAdam
from megatron_patches.cpu.emulation import cpu_megatron
from mols_ds.errors import MolsUnsupportedError
from tests.engines.megatron.building import Setup, build, mean_loss, newest, optimizer, start, step, stop
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

ITERATIONS = 3
# All of them the same logical model; 4 layers, so that the interleaved schedule has a layer for each of its stages.
DENSE = {
    "DP2": Setup(layers=4),
    "DP2 without DistributedOptimizer": Setup(layers=4, distributed=False),
    "two instances": Setup(layers=4, instances=2),
    "overlap": Setup(layers=4, overlap=True),
    "TP2": Setup(layers=4, tp=2),
    "TP2, sequence parallel, recompute": Setup(layers=4, tp=2, sp=True, recompute="core_attn"),
    "PP2": Setup(layers=4, pp=2),
    "PP2 interleaved": Setup(layers=4, pp=2, vp=2),
}
EXPERTS = {
    "DP2": Setup(experts=4),
    "EP2": Setup(experts=4, ep=2),
    "TP2": Setup(experts=4, tp=2, sp=True),
    "TP2, EP2, expert-TP 1": Setup(experts=4, tp=2, sp=True, ep=2, etp=1),
}
TIED = {
    "DP2": Setup(tied=True, bias=True, position="learned"),
    "PP2": Setup(tied=True, bias=True, position="learned", pp=2),
    "TP2": Setup(tied=True, bias=True, position="learned", tp=2),
}
KINDS = {"dense": DENSE, "experts": EXPERTS, "tied": TIED}
CASES: Cases[tuple[str, str]] = Cases(
    [
        *((kind, name) for kind, setups in KINDS.items() for name in setups),
        ("dense", "fused"),
        ("dense", "left behind"),
    ],
    quick=[("dense", "DP2"), ("dense", "TP2"), ("dense", "PP2"), ("experts", "EP2"), ("dense", "left behind")],
    needs=lambda case: [("dense", "TP2")] if case[1] == "fused" else [(case[0], "DP2")],
)
# Sharded and whole sums add in another order, and Adam divides by the root of small numbers. Seen: 1e-6.
TOLERANCE = 1e-5


def train(setup: Setup, fused_adam: bool = False) -> list[tuple[bool, float, float]]:
    """(successful, gradient norm, loss) of each iteration."""
    with cpu_megatron(fused_adam=fused_adam):
        start(setup)
        built = build(setup)
        inner, scheduler = optimizer(built, adam_eps=1e-5)  # of the size of the gradients: noise stays noise
        seen = []
        for iteration in range(ITERATIONS):
            stepped = step(built, inner, scheduler, iteration)
            assert stepped.grad_norm is not None
            seen.append((stepped.successful, stepped.grad_norm, mean_loss(stepped)))
        stop()
    return seen


def case(what: Setup | str) -> Any:
    """Cases of one launch: a setup, the same with the other Adam, or the check for traces."""
    if isinstance(what, Setup):
        return train(what)
    return train(DENSE["TP2"], fused_adam=True) if what == "fused" else left_behind()


def left_behind() -> list[str]:
    """Names in torch and megatron-core that are not what they were before a context was entered and left."""
    with cpu_megatron():  # imports
        pass
    core = "megatron.core."
    modules = [torch.cuda, torch.cuda.random, torch.cuda.nvtx, torch] + [
        importlib.import_module(core + name)
        for name in (
            "optimizer",
            "optimizer.distrib_optimizer",
            "tensor_parallel.random",
            "transformer.multi_latent_attention",
            "transformer.moe.moe_utils",
            "transformer.moe.token_dispatcher",
        )
    ]
    norm = importlib.import_module(core + "transformer.torch_norm").WrappedTorchNorm
    attention = importlib.import_module(core + "transformer.dot_product_attention").DotProductAttention
    owners: list[Any] = [*modules, norm, attention, torch.Tensor]
    before, finders = [dict(vars(owner)) for owner in owners], list(sys.meta_path)
    with pytest.raises(ZeroDivisionError), cpu_megatron():
        stream = torch.cuda.Stream
        with cpu_megatron(fused_adam=True):
            assert vars(modules[4])["Adam"] is CpuFusedAdam
            assert torch.cuda.Stream is stream
        assert vars(modules[4])["Adam"] is not CpuFusedAdam, "the inner context takes its own part away"
        assert torch.zeros(1, device="cuda").type() == "torch.cuda.FloatTensor", "and leaves the outer one's"
        raise ZeroDivisionError
    changed = [
        f"{getattr(owner, '__name__', owner)}.{name}"
        for owner, names in zip(owners, before, strict=True)
        for name in names.keys() | vars(owner).keys()
        if names.get(name, names) is not vars(owner).get(name, names)
    ]
    if sys.meta_path != finders:
        changed.append("sys.meta_path")
    if torch.zeros(1).type() != "torch.FloatTensor":
        changed.append("Tensor.type")
    return changed


@pytest.fixture(scope="module")
def results() -> Results:
    return run_cases(case, 2, [(KINDS[kind].get(name, name),) for kind, name in CASES.wanted])


def same(runs: list[list[list[tuple[bool, float, float]]]]) -> None:
    every = [rank for ranks in runs for rank in ranks]
    assert all(successful for rank in every for successful, _, _ in rank)
    numbers = torch.tensor(every, dtype=torch.float64)
    torch.testing.assert_close(numbers, numbers[:1].expand_as(numbers), rtol=TOLERANCE, atol=0.0)


@pytest.mark.distributed
@CASES.parametrize(("kind", "name"), [(kind, name) for kind, setups in KINDS.items() for name in setups])
def test_every_grid_trains_the_same_model(results: Results, kind: str, name: str) -> None:
    """That of the same kind on two data-parallel ranks."""
    runs = [results[(KINDS[kind][of],)] for of in ("DP2", name)]
    same(runs)
    losses = [loss for _, _, loss in runs[0][0]]
    assert all(later != earlier for earlier, later in pairwise(losses))


@pytest.mark.distributed
@CASES.reads(("dense", "fused"))
def test_fused_adam_trains_as_torch_adamw(results: Results) -> None:
    assert results[("fused",)] == results[(DENSE["TP2"],)]


@pytest.mark.distributed
@CASES.reads(("dense", "left behind"))
def test_nothing_is_left_behind(results: Results) -> None:
    assert results[("left behind",)] == [[], []]


@pytest.mark.distributed
@pytest.mark.skipif(newest() is None, reason="no newest megatron-core: make setup-dev, or MOLS_MEGATRON_NEWEST=folder")
@pytest.mark.tier("full")
@CASES.reads(("dense", "DP2"), ("experts", "EP2"))
def test_the_newest_version_trains_the_same_model(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["TP2", "PP2", "DP2"]
    monkeypatch.setenv("PYTHONPATH", str(newest()))
    new = run_cases(case, 2, [(DENSE[name],) for name in names] + [(EXPERTS["EP2"],), ("left behind",)])
    same([new[(DENSE[name],)] for name in names] + [results[(DENSE["DP2"],)]])
    same([new[(EXPERTS["EP2"],)], results[(EXPERTS["EP2"],)]])
    assert new[("left behind",)] == [[], []]


def test_without_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron", None)  # type: ignore[arg-type]  # what Python makes of "not there"
    with pytest.raises(MolsUnsupportedError, match="pip install"), cpu_megatron():
        pass


@pytest.mark.parametrize("module", ["transformer_engine", "amp_C"])
def test_refuses_cuda_kernels(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    installed = ModuleType(module)
    installed.__spec__ = ModuleSpec(module, None)
    monkeypatch.setitem(sys.modules, module, installed)
    with pytest.raises(MolsUnsupportedError, match=module), cpu_megatron():
        pass
    assert torch.zeros(1).type() == "torch.FloatTensor"


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_has_the_bits_of_torch(decoupled: bool, decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.linspace(-1, 1, 37))] for _ in range(2))
    fused = CpuFusedAdam(ours, lr=1e-2, betas=(0.9, 0.95), adam_w_mode=decoupled, weight_decay=decay)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    stock = kind(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=decay, foreach=False)
    for number in range(7):
        ours[0].grad = torch.randn(37, generator=generator)
        theirs[0].grad = ours[0].grad.clone()
        for one in (fused, stock):
            one.param_groups[0]["lr"] = 1e-2 / (number + 1)
            one.step()
        assert torch.equal(ours[0], theirs[0])
    assert fused.param_groups[0]["step"] == 7
    assert fused.state[ours[0]].keys() == {"exp_avg", "exp_avg_sq"}


def test_adam_state_comes_back_and_empty_groups_stand_still() -> None:
    def fresh() -> tuple[torch.nn.Parameter, CpuFusedAdam]:
        parameter = torch.nn.Parameter(torch.ones(5))
        return parameter, CpuFusedAdam([{"params": [parameter]}, {"params": []}])

    def train_on(parameter: torch.nn.Parameter, adam: CpuFusedAdam) -> None:
        parameter.grad = torch.arange(5.0)
        adam.step()

    one, first = fresh()
    train_on(one, first)
    other, second = fresh()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        other.copy_(one)
    train_on(one, first)
    train_on(other, second)
    assert torch.equal(one, other)
    assert [group.get("step") for group in second.param_groups] == [2, None]
    with pytest.raises(ValueError, match="store_param_remainders"):
        CpuFusedAdam([one], store_param_remainders=True)
