"""Group tables of well-known models on the meta device, with Transformer Engine's names too, against hand counts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from megatron_patches.group_rules import tag_layouts, tag_table
from mols_ds.core.groups import GroupTable
from tests.engines.megatron.tag_models import MLA, SMALL, make_bert, make_gpt, one_rank, shapes_of
from tests.engines.megatron.te_names import te_shapes


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    with one_rank():
        yield


LLAMA_7B = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 11008}
LLAMA_70B = {
    "num_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_query_groups": 8,
    "ffn_hidden_size": 28672,
}
MIXTRAL = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "ffn_hidden_size": 14336,
    "moe_ffn_hidden_size": 14336,
    "num_moe_experts": 8,
}
DEEPSEEK_V3 = {
    "num_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "ffn_hidden_size": 18432,
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "num_moe_experts": 256,
    "moe_router_topk": 8,
    "moe_ffn_hidden_size": 2048,
    "moe_shared_expert_intermediate_size": 2048,
    "moe_layer_freq": [0] * 3 + [1] * 58,
    "mtp_num_layers": 1,
}

# One multi-token-prediction layer of DeepSeek-V3, which is a MoE layer; it shares embedding and output layer.
_MTP = {
    "qk": 1536 * 7168 + 128 * (128 + 64) * 1536 + 64 * 7168 + 128 * 128 * 512,
    "vo": 512 * 7168 + 128 * 128 * 512 + 7168 * 128 * 128,
    "mlp": (256 + 1) * 3 * 7168 * 2048,
    # router; norms of layer, queries and latent; eh_proj; enorm, hnorm and the last norm
    "other": 256 * 7168 + 2 * 7168 + 1536 + 512 + 7168 * 2 * 7168 + 3 * 7168,
}

# settings, vocabulary, elements of each group by hand, published number of weights
MODELS: dict[str, tuple[dict[str, Any], int, dict[str, int], int]] = {
    "llama_7b": (
        LLAMA_7B,
        32000,
        {
            "embedding": 32000 * 4096,
            "head": 32000 * 4096,
            "qk": 32 * (4096 * 4096 + 4096 * 4096),
            "vo": 32 * (4096 * 4096 + 4096 * 4096),
            "mlp": 32 * 3 * 4096 * 11008,
            "other": 32 * 2 * 4096 + 4096,
        },
        6_738_415_616,
    ),
    "llama_70b": (
        LLAMA_70B,
        32000,
        {
            "embedding": 32000 * 8192,
            "head": 32000 * 8192,
            "qk": 80 * (64 * 128 * 8192 + 8 * 128 * 8192),  # 64 query heads and 8 key heads of 128
            "vo": 80 * (8 * 128 * 8192 + 8192 * 64 * 128),  # 8 value heads, and linear_proj
            "mlp": 80 * 3 * 8192 * 28672,
            "other": 80 * 2 * 8192 + 8192,
        },
        68_976_648_192,
    ),
    "mixtral_8x7b": (
        MIXTRAL,
        32000,
        {
            "embedding": 32000 * 4096,
            "head": 32000 * 4096,
            "qk": 32 * (32 * 128 * 4096 + 8 * 128 * 4096),
            "vo": 32 * (8 * 128 * 4096 + 4096 * 32 * 128),
            "mlp": 32 * 8 * 3 * 4096 * 14336,
            "other": 32 * (2 * 4096 + 8 * 4096) + 4096,  # two norms and the router of each layer, the last norm
        },
        46_702_792_704,
    ),
    "deepseek_v3": (
        DEEPSEEK_V3,
        129280,
        {
            "embedding": 129280 * 7168,
            "head": 129280 * 7168,
            # queries down and up, rotary key, keys out of the latent
            "qk": 61 * (1536 * 7168 + 128 * (128 + 64) * 1536 + 64 * 7168 + 128 * 128 * 512) + _MTP["qk"],
            # the latent itself, values out of it, linear_proj
            "vo": 61 * (512 * 7168 + 128 * 128 * 512 + 7168 * 128 * 128) + _MTP["vo"],
            "mlp": 3 * (3 * 7168 * 18432) + 58 * (256 + 1) * (3 * 7168 * 2048) + _MTP["mlp"],
            "other": 61 * (2 * 7168 + 1536 + 512) + 58 * 256 * 7168 + 7168 + _MTP["other"],
        },
        # 671,026,419,200 are published; 58 x 256 of them balance the experts and are a buffer in Megatron
        671_026_419_200 - 58 * 256 + sum(_MTP.values()),
    ),
}


TIERS = {"llama_7b": "all", "mixtral_8x7b": "all", "deepseek_v3": "full"}  # the small model below has its MLA and MTP


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.tier(TIERS.get(name, "quick"))) for name in MODELS]
)
def test_tables_of_known_models_equal_counts_by_hand(name: str) -> None:
    settings, vocabulary, expected, total = MODELS[name]
    assert sum(expected.values()) == total
    model = make_gpt(vocabulary, device="meta", **settings)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    table = tag_table(model)
    assert table.elements == expected
    # The same config with the names of Transformer Engine's spec: other parameters, the same groups.
    counterpart = te_shapes(table.shapes)
    assert counterpart.keys() != table.shapes.keys()
    assert _elements(counterpart, model.config) == expected
    if name == "deepseek_v3":
        newest = te_shapes(table.shapes, experts="single", fused_down=True)
        assert "decoder.layers.0.self_attention.linear_qkv_down_proj.layer_norm_weight" in newest
        assert _elements(newest, model.config) == expected


def _elements(shapes: Mapping[str, tuple[int, ...]], config: object) -> dict[str, int]:
    return GroupTable(tag_layouts(shapes, config), shapes).elements


def test_names_of_transformer_engine() -> None:
    """The derived names are those that the issue and Megatron's own checkpoint maps spell out."""
    dense = make_gpt(**SMALL, num_query_groups=2)
    names = te_shapes(shapes_of(dense))
    assert {
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.final_layernorm.weight",
    } <= names.keys()
    assert not any("input_layernorm" in name or "pre_mlp_layernorm" in name for name in names)
    sparse = make_gpt(
        **SMALL, **{**MLA, "q_lora_rank": 8}, qk_layernorm=True, num_moe_experts=2, moe_router_topk=2, mtp_num_layers=1
    )
    names = te_shapes(shapes_of(sparse))
    # transformer_layer up to 0.16, mtp_model_layer from 0.17 on
    (layer,) = {found[1] for name in names if (found := re.match(r"(mtp\.layers\.0\.\w+_layer\.)", name))}
    assert {
        f"{layer}input_layernorm.weight",
        f"{layer}self_attention.linear_q_up_proj.layer_norm_weight",
        f"{layer}self_attention.linear_kv_up_proj.layer_norm_weight",
        f"{layer}pre_mlp_layernorm.weight",
        f"{layer}mlp.experts.linear_fc1.weight1",
    } <= names.keys()
    layouts = tag_layouts(names, sparse.config, granularity="layer_type")
    assert layouts["decoder.layers.0.self_attention.linear_kv_up_proj.weight"].groups == ("qk.0", "vo.0")
    # multi-token prediction is numbered behind the decoder
    assert layouts[f"{layer}self_attention.linear_kv_up_proj.weight"].groups == ("qk.1", "vo.1")
    assert layouts[f"{layer}mlp.experts.linear_fc1.weight1"].groups == ("mlp.1",)
    assert layouts["mtp.layers.0.eh_proj.weight"].groups == ("other",)
    for name in names:
        if "norm" in name or "router" in name:
            assert layouts[name].groups == ("other",), name


def test_bert() -> None:
    assert tag_table(make_bert()).elements == {
        "embedding": (32 + 16 + 2) * 24,
        "head": 32 * 24 + 2 * 24,  # the binary head too
        "qk": 2 * 24 * 24,
        "vo": 2 * 24 * 24,
        "mlp": 2 * 24 * 40,
        # biases of qkv, linear_proj, fc1, fc2; two norms, last norm; LM head: dense, norm, output bias; pooler; binary
        "other": 72 + 24 + 40 + 24 + 2 * 24 + 24 + (24 * 24 + 24) + 24 + 32 + (24 * 24 + 24) + 2,
    }
