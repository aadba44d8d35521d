"""Each mistake is a clear error on every rank, also where one rank alone makes it; none hangs, none leaves a trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_patches.cpu.emulation import cpu_megatron
from mols_ds.errors import MolsError
from tests.engines.megatron import building
from tests.engines.megatron.building import Built, Setup, samples_per_step
from tests.engines.megatron.running import SECTION
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

WORLD = 2


class Given:
    """Arguments of `attach`; a mistake changes some of them, on both ranks or on one."""

    def __init__(self, setup: Setup, **settings: Any) -> None:
        building.start(setup)
        self.setup = setup
        self.built: Built = building.build(setup)
        self.optimizer, self.scheduler = building.optimizer(self.built, **settings)
        self.chunks = self.built.chunks
        self.section: dict[str, Any] = dict(SECTION)
        self.per_step: int | None = samples_per_step(setup)

    def attach(self) -> Any:
        import megatron_patches

        return megatron_patches.attach(
            self.chunks, self.optimizer, self.scheduler, self.section, samples_per_step=self.per_step
        )


def second() -> bool:
    """Whether this is the one rank that makes the mistake."""
    return dist.get_rank() == 1


def innermost(built: Built) -> Any:
    model = built.chunks[0]
    while hasattr(model, "module"):
        model = model.module
    return model


def unknown_name() -> Given:
    given = Given(Setup())
    mlp = innermost(given.built).decoder.layers[0].mlp
    mlp.mystery = mlp._modules.pop("linear_fc1")
    return given


def query_groups(one: bool) -> Given:
    given = Given(Setup(tp=2))
    if second() or not one:
        given.built.config.num_query_groups = 3
    return given


def other_model(**of_rank_1: Any) -> Given:
    common = {key: of_rank_1[key] for key in ("tp", "distributed") if key in of_rank_1}
    return Given(Setup(**of_rank_1) if second() else Setup(**common))


def stepped() -> Given:
    given = Given(Setup())
    for iteration in range(3):
        building.step(given.built, given.optimizer, given.scheduler, iteration)
    return given


def section(**keys: Any) -> Given:
    given = Given(Setup())
    given.section |= keys
    return given


def sections_differ() -> Given:
    return section(samples=5 if second() else 4)


def chunk_missing() -> Given:
    given = Given(Setup(pp=2, vp=2, layers=4))
    if second():
        given.chunks = given.chunks[:1]
    return given


def no_chunks() -> Given:
    given = Given(Setup())
    if second():
        given.chunks = []
    return given


def shares() -> Given:
    given = Given(Setup())
    given.section, given.per_step = {}, None
    return given


def no_samples() -> Given:
    given = Given(Setup())
    given.per_step = 0
    return given


def attached() -> Given:
    given = Given(Setup())
    given.attach()
    return given


def inner_alone() -> Given:
    given = Given(Setup())
    given.optimizer = given.optimizer.chained_optimizers[0]
    return given


def cuda_graph() -> Given:
    given = Given(Setup())
    if second():
        for one in given.optimizer.chained_optimizers:
            one.config.optimizer_cuda_graph = True
    return given


def other_model_given() -> Given:
    given = Given(Setup())
    given.chunks = building.build(given.setup).chunks
    return given


def no_grid() -> Given:
    given = Given(Setup())
    building.stop()
    return given


def sgd_moments() -> Given:
    given = Given(Setup(distributed=False), optimizer="sgd")
    given.section |= {"mode": "moments"}
    return given


MISTAKES: dict[str, tuple[Callable[[], Given], tuple[str, ...]]] = {
    "unknown name": (unknown_name, ("MolsConfigError", "mlp.mystery.weight")),
    "query groups": (functools.partial(query_groups, False), ("linear_qkv", "3")),
    "query groups of one rank": (functools.partial(query_groups, True), ("linear_qkv", "3")),
    "other width on one rank": (functools.partial(other_model, tp=2, hidden=48), ("unsharded shape", "model config")),
    "fewer layers on one rank": (
        functools.partial(other_model, tp=2, layers=1),
        ('group "qk" has 3072 elements in the whole model', "own 2304"),
    ),
    "more layers on a replica": (
        functools.partial(other_model, distributed=False, layers=3),
        ("decoder.layers.2", "without it"),
    ),
    "past the start": (stepped, ("MolsConfigError", '"mols.start" is step 2', "3 already")),
    "chunk missing on one rank": (chunk_missing, ("no given model chunk has", "pass all chunks")),
    "no chunks on one rank": (no_chunks, ("no model chunk was given",)),
    "another model's chunks": (other_model_given, ("no given model chunk has",)),
    "share without steps": (shares, ("MolsConfigError", "mols.total_steps")),
    "samples_per_step": (no_samples, ("MolsConfigError", "samples_per_step is 0")),
    "unknown key": (functools.partial(section, sampels=3), ("MolsConfigError", '"samples"')),
    "sections differ": (sections_differ, ('the "mols" section', "rank 1")),
    "reference": (functools.partial(section, reference="attention"), ("MolsConfigError", "mols.reference")),
    "fixed_alphas": (functools.partial(section, fixed_alphas={"body": 2.0}), ("MolsConfigError", "body")),
    "rule without match": (functools.partial(section, rules=[["nowhere", "mlp"]]), ("MolsConfigError", "nowhere")),
    "attached already": (attached, ("has MoLS already", "detach")),
    "not a chain": (inner_alone, ("MolsUnsupportedError", "DistributedOptimizer", "get_megatron_optimizer")),
    "CUDA graph on one rank": (cuda_graph, ("MolsUnsupportedError", "optimizer_cuda_graph")),
    "no grid": (no_grid, ("MolsUnsupportedError", "initialize_model_parallel")),
    "moments of SGD": (sgd_moments, ("moments",)),
}

NAMES = Cases([*MISTAKES, "SGD"], quick=["unknown name", "fewer layers on one rank", "sections differ", "not a chain"])


def mistaken(name: str) -> tuple[str, bool]:
    """Message of `attach`, and whether the optimizer is unchanged."""
    with cpu_megatron():
        given = MISTAKES[name][0]()
        before = set(vars(given.optimizer))
        try:
            given.attach()
        except MolsError as error:
            dist.barrier()  # every rank is here: none hangs in a collective of attach()
            return f"{type(error).__name__}: {error}", set(vars(given.optimizer)) == before
    return "no error", False


def sgd() -> dict[str, Any]:
    """SGD with momentum is proportional to the rate: fine in the modes that measure gradients."""
    with cpu_megatron():
        given = Given(Setup(distributed=False), optimizer="sgd")
        mols = given.attach()
        for iteration in range(14):
            building.step(given.built, given.optimizer, given.scheduler, iteration)
        return {"phase": mols.phase, "alphas": mols.alphas, "steps": mols.steps}


def case(name: str) -> Any:
    return sgd() if name == "SGD" else mistaken(name)


@functools.cache
def outcomes() -> Results:
    return run_cases(case, WORLD, [(name,) for name in NAMES.wanted], timeout=40)


@NAMES.parametrize("name", MISTAKES)
def test_a_mistake_is_an_error_on_every_rank(name: str) -> None:
    for rank, (said, untouched) in enumerate(outcomes()[name,]):
        for part in MISTAKES[name][1]:
            assert part in said, f"rank {rank}: {said}"
        assert untouched


@NAMES.reads("SGD")
def test_sgd_works() -> None:
    first, other = outcomes()["SGD",]
    assert first == other and first["phase"] == "fixed" and first["steps"] == 10
    assert len(set(first["alphas"].values())) > 2
