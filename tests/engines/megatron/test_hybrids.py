"""Hybrid stacks, of the newest megatron-core: mixers, gated delta nets, sparse and latent attention, experts."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.engines.megatron.building import newest
from tests.engines.megatron.hybrids import delta_net_rows
from tests.engines.megatron.tag_models import MLA
from tests.helpers.harness import run_cases

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.tier("all"),
    pytest.mark.skipif(newest() is None, reason="no newest megatron-core: make setup-dev"),
]
SETTINGS: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 4, "ffn_hidden_size": 40}
LATENT = {**MLA, "q_lora_rank": 8, "qk_layernorm": True}
LATENT |= {"dsa_indexer_n_heads": 2, "dsa_indexer_head_dim": 8, "dsa_indexer_topk": 4}
EXPERTS = {"num_moe_experts": 2, "moe_router_topk": 2, "moe_shared_expert_intermediate_size": 16}


@functools.cache
def of_newest(fn: Any, ranks: int, *case: Any) -> list[Any]:
    found = run_cases(fn, ranks, [case], environment={"PYTHONPATH": str(newest())})
    return list(found[case])


def test_rows_of_a_gated_delta_net_on_two_ranks() -> None:
    for measured, tagged in of_newest(delta_net_rows, 2):
        assert tagged == measured
        assert set(measured) == {"qk", "vo", "other"}
