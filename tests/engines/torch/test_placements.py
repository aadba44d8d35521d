"""Parameters as DTensors of every placement get the statistics and the rates of plain ones, also fused projections.

Gradients are drawn, so that no forward pass has to support the placement.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard  # what FSDP2 makes of tensor-parallel parameters
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, Phi3Config, Phi3ForCausalLM

import mols_ds
from mols_ds.errors import MolsUnsupportedError
from tests.engines.torch.parallel import full_weights, placed
from tests.helpers.harness import Results, run_cases, run_ranks
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

SAMPLES, STEPS = 4, 9
SECTION = {"mode": "online", "samples": SAMPLES, "start": 0, "ramp_end": 5, "alpha_min": 1e-3, "alpha_max": 1e3}
ATOL = 1e-6  # of weights, which move by 1e-2: rates of fused parts are corrected after the step, which rounds twice
RTOL = 1e-9  # of alphas: float64 sums in another order
MODELS = ("gpt2", "phi3", "neox")
"""With fused columns q | k | v, fused rows q | k | v with grouped queries, and rows interleaved by head."""
PLACEMENTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "rows": ((2,), (Shard(0),)),
    "rows, whole gradients": ((2,), (Shard(0),)),
    "copies, partial gradients": ((2,), (Replicate(),)),
    "columns": ((2,), (Shard(1),)),
    "copies": ((2,), (Replicate(),)),
    "last": ((2,), (Shard(-1),)),
    "rows of 4": ((4,), (Shard(0),)),
    "rows of rows": ((2, 2), (Shard(0), Shard(0))),
    "rows of columns": ((2, 2), (Shard(1), Shard(0))),
    "columns of columns": ((2, 2), (Shard(1), Shard(1))),
    "copies of rows": ((2, 2), (Replicate(), Shard(0))),
    "rows of copies": ((2, 2), (Shard(0), Replicate())),
    "strided rows": ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    "strided columns": ((2, 2), (_StridedShard(1, split_factor=2), Shard(1))),
}
QUICK = [("gpt2", "columns"), ("neox", "columns"), ("phi3", "strided rows"), ("gpt2", "copies of rows")]
CASES = Cases(
    [(model, name) for model in MODELS for name in PLACEMENTS],
    quick=QUICK,
    full=[
        (model, name)
        for turn, name in enumerate(PLACEMENTS)
        for model in MODELS
        if model != MODELS[turn % 3] and (model, name) not in QUICK
    ],
)


def built(model: str) -> nn.Module:
    """Sizes that do not divide evenly: 97 tokens, 3 heads."""
    torch.manual_seed(0)
    ids = {"vocab_size": 97, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if model == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**ids, n_embd=24, n_inner=30, n_layer=1, n_head=3, n_positions=8))
    sizes = {"hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 1, "num_attention_heads": 3}
    if model == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**ids, **sizes))
    return Phi3ForCausalLM(Phi3Config(**ids, **sizes, num_key_value_heads=1))


def gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    """A signal that grows along the elements, and noise."""
    numel = shape.numel()
    signal = torch.linspace(0.05, 1.0, numel).view(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + step)
    return signal + torch.randn(shape, generator=generator)


def run(model: str, name: str) -> dict[str, Any]:
    """STEPS updates with a calibration: alphas and whole weights of the plain model and of the placed one."""
    sizes, placements = PLACEMENTS[name]
    mesh = init_device_mesh("cpu", sizes)
    found = {}
    for kind in ("plain", "placed"):
        module = built(model)
        if kind == "placed":
            module = placed(module, mesh, lambda _, p: tuple(_for(one, p.ndim) for one in placements))
        optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, weight_decay=0.1)
        mols = mols_ds.attach(optimizer, module, SECTION, total_steps=STEPS)
        for step in range(STEPS):
            for key, p in module.named_parameters():
                whole = gradient(key, p.shape, step)
                p.grad = _gradient_of(p, whole, name)
            mols.read_gradients()
            optimizer.step()
        cut = [key for key, layout in mols.shards.layouts.items() if len(layout.groups) > 1]
        found[kind] = {"alphas": mols.alphas, "weights": full_weights(module), "cut": len(cut)}
    return found


def _gradient_of(parameter: nn.Parameter, whole: Tensor, name: str) -> Tensor:
    """The gradient as a backward pass leaves it: in the parameter's placements, or in others (tensor parallelism)."""
    if not isinstance(parameter, DTensor):
        return whole
    if "partial" in name:
        return DTensor.from_local(whole / 2, parameter.device_mesh, [Partial()])
    placements = [Replicate()] if "whole" in name else parameter.placements
    return distribute_tensor(whole, parameter.device_mesh, placements, src_data_rank=None)


def _for(placement: Any, ndim: int) -> Any:
    """The placement of a matrix, for a vector."""
    if ndim > 1 or placement.is_replicate() or placement.dim < 1:
        return placement
    factor = getattr(placement, "split_factor", None)
    return Shard(0) if factor is None else _StridedShard(0, split_factor=factor)


@functools.cache
def results(world: int) -> Results:
    return run_cases(run, world, [case for case in CASES.wanted if _world(case[1]) == world], timeout=60)


def _world(name: str) -> int:
    sizes = PLACEMENTS[name][0]
    return sizes[0] * (sizes[1] if len(sizes) > 1 else 1)


@CASES.parametrize(("model", "name"))
def test_a_placed_parameter_is_measured_and_scaled_as_a_plain_one(model: str, name: str) -> None:
    ranks = results(_world(name))[model, name]
    assert any(rank["placed"]["cut"] for rank in ranks), "no rank has a part with two groups"
    for rank in ranks:
        plain, placed = rank["plain"], rank["placed"]
        assert placed["alphas"] == pytest.approx(plain["alphas"], rel=RTOL)
        assert max(plain["alphas"].values()) / min(plain["alphas"].values()) > 1.05
        for key, weights in plain["weights"].items():
            assert float((placed["weights"][key] - weights).abs().max()) <= ATOL, key


def refused() -> str:
    """What attach says to a parameter that is a sum over the ranks."""
    mesh, module = init_device_mesh("cpu", (2,)), built("gpt2")
    mlp = module.transformer.h[0].mlp.c_fc
    mlp.weight = nn.Parameter(DTensor.from_local(mlp.weight.detach(), mesh, [Partial()]))
    with pytest.raises(MolsUnsupportedError) as error:
        mols_ds.attach(torch.optim.AdamW(module.parameters()), module, SECTION, total_steps=STEPS)
    return str(error.value)


@pytest.mark.tier("all")
def test_partial_parameters_are_refused_by_name() -> None:
    for line in run_ranks(refused, 2):
        assert "c_fc.weight" in line and "Partial" in line and "use Shard or Replicate" in line
