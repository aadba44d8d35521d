"""Hybrid stacks, of the newest megatron-core: mixers, gated delta nets, sparse and latent attention, experts."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.engines.megatron.building import newest
from tests.engines.megatron.hybrids import DELTA_NET, MAMBA, delta_net_rows, groups_of_layers
from tests.engines.megatron.tag_models import MLA
from tests.helpers.harness import Results, run_cases

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.tier("all"),
    pytest.mark.skipif(newest() is None, reason="no newest megatron-core: make setup-dev"),
]
SETTINGS: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 4, "ffn_hidden_size": 40}
LATENT = {**MLA, "q_lora_rank": 8, "qk_layernorm": True}
LATENT |= {"dsa_indexer_n_heads": 2, "dsa_indexer_head_dim": 8, "dsa_indexer_topk": 4}
EXPERTS = {"num_moe_experts": 2, "moe_router_topk": 2, "moe_shared_expert_intermediate_size": 16}
STACKS = {"MG*-": {**SETTINGS, **MAMBA, **DELTA_NET}, "D+E": {**SETTINGS, **LATENT, **EXPERTS}}
# What is not `other` of each, by hand
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "MG*-": {
        "layers.1.self_attention.in_proj": ("qk", "vo", "other"),
        "layers.1.self_attention.out_proj": ("vo",),
        "layers.2.self_attention.linear_qkv": ("qk", "vo"),
        "layers.2.self_attention.linear_proj": ("vo",),
        "layers.3.mlp.linear_fc1": ("mlp",),
        "layers.3.mlp.linear_fc2": ("mlp",),
    },
    "D+E": {
        **{
            f"layers.{layer}.self_attention.{name}": groups
            for layer in (0, 1)
            for name, groups in {
                "linear_q_down_proj": ("qk",),
                "linear_q_up_proj": ("qk",),
                "linear_kv_down_proj": ("vo", "qk"),
                "linear_kv_up_proj": ("qk", "vo"),
                "linear_proj": ("vo",),
            }.items()
        },
        **{f"layers.2.mlp.shared_experts.linear_fc{n}": ("mlp",) for n in (1, 2)},
        **{f"layers.2.mlp.experts.local_experts.{e}.linear_fc{n}": ("mlp",) for e in (0, 1) for n in (1, 2)},
    },
}


@functools.cache
def of_newest(fn: Any, ranks: int, *cases: tuple[Any, ...]) -> Results:
    return run_cases(fn, ranks, cases, environment={"PYTHONPATH": str(newest())})


@pytest.mark.parametrize("pattern", STACKS)
def test_groups_of_hybrid_stacks(pattern: str) -> None:
    (found,) = of_newest(groups_of, 1, *((name,) for name in STACKS))[pattern,]
    placed = {name: groups for name, groups in found.items() if groups != ("other",)}
    decoder = {f"decoder.{name}.weight": groups for name, groups in GROUPS[pattern].items()}
    assert placed == {"embedding.word_embeddings.weight": ("embedding",), "output_layer.weight": ("head",), **decoder}
    kinds = {"MG*-": ("mixer.in_proj", "mixer.out_proj", "conv1d"), "D+E": ("indexer.linear_wk", "mlp.router")}[pattern]
    assert all(any(kind in name for name in found) for kind in kinds)


def groups_of(pattern: str) -> dict[str, tuple[str, ...]]:
    return groups_of_layers(pattern, STACKS[pattern])


def test_rows_of_a_gated_delta_net_on_two_ranks() -> None:
    for measured, tagged in of_newest(delta_net_rows, 2, ())[()]:
        assert tagged == measured
        assert set(measured) == {"qk", "vo", "other"}
