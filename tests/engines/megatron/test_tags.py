"""Tags of Megatron-core models: fused rows proven by autograd, names, and bad input."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_patches.group_rules import tag_layouts, tag_table
from mols_ds.errors import MolsConfigError
from tests.engines.megatron.tag_models import (
    FUSED,
    MEGATRON,
    MLA,
    SMALL,
    attention_rows,
    make_gpt,
    make_t5,
    one_rank,
    row_groups,
    rows_by_autograd,
    tensor_parallel_rows,
)
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    with one_rank():
        yield


# ------------------------------------------------------------------------------------------- fused rows, by autograd


@pytest.mark.parametrize("case", FUSED)
def test_fused_rows_are_those_that_move_queries_keys_and_values(case: str) -> None:
    found = attention_rows(case, 1)
    assert any({"qk", "vo"} <= set(measured) for _, measured, _ in found)
    for name, measured, tagged in found:
        assert tagged == measured, name


# 0.15 cannot give the ranks less than one query group.
SHARDED = Cases([case for case in FUSED if MEGATRON >= (0, 16) or case != "mqa_wide_heads"], quick=["gqa"])


@pytest.fixture(scope="module")
def two_ranks() -> Results:
    return run_cases(tensor_parallel_rows, 2, [(case,) for case in SHARDED.wanted])


@pytest.mark.distributed
@SHARDED.parametrize("case")
def test_a_tensor_parallel_shard_is_a_range_of_the_logical_rows(case: str, two_ranks: Results) -> None:
    ranks = two_ranks[(case,)]
    for found in ranks:
        for name, measured, tagged in found:
            assert tagged == measured, name
    assert len(ranks) == 2
    if case == "mqa_wide_heads":  # one group on two ranks: the first rank holds queries only, the second the value
        assert [set(found[0][1]) for found in ranks] == [{"qk"}, {"qk", "vo"}]


@pytest.mark.skipif(MEGATRON < (0, 16), reason="the vanilla T5 spec of 0.15 needs Transformer Engine")
def test_cross_attention_rows_and_names_of_t5() -> None:
    model = make_t5(kv_channels=10, add_bias_linear=True)
    table = tag_table(model)
    attention: Any = model.get_submodule("decoder.layers.0.cross_attention")
    hidden, other = torch.randn(3, 2, 24), torch.randn(5, 2, 24)
    tensors = attention.get_query_key_value_tensors(hidden, other)
    names = ("linear_q.weight", "linear_kv.weight")
    parameters = {name: attention.get_parameter(name) for name in names}
    measured = rows_by_autograd(parameters, dict(zip(("query", "key", "value"), tensors, strict=True)))
    for name, rows in measured.items():
        full = f"decoder.layers.0.cross_attention.{name}"
        assert row_groups(table.layouts[full], table.shapes[full]) == rows, name
    whole = {name: layout.groups for name, layout in table.layouts.items()}
    assert whole["lm_head.output_layer.weight"] == ("head",)
    assert whole["embedding.word_embeddings.weight"] == ("embedding",)
    assert whole["decoder.layers.0.cross_attention.linear_proj.weight"] == ("vo",)
    for linear in ("linear_q", "linear_kv"):
        assert whole[f"decoder.layers.0.cross_attention.{linear}.bias"] == ("other",)
    assert whole["encoder_relative_pos_emb.relative_attention_bias.weight"] == ("other",)


def test_names_that_no_model_on_the_cpu_has() -> None:
    config = {"linear_key_head_dim": 4, "linear_num_key_heads": 2, "linear_value_head_dim": 6, "hidden_size": 24}
    config |= {"linear_num_value_heads": 4, "tensor_model_parallel_size": 2}
    attention = "decoder.layers.0.self_attention."
    shapes = {
        f"{attention}in_proj.weight": (2 * 8 + 2 * 24 + 2 * 4, 24),
        f"{attention}in_proj.layer_norm_weight": (24,),
        f"{attention}conv1d.weight": (40, 1, 4),
        f"{attention}A_log": (4,),
        f"{attention}out_proj.weight": (24, 24),
        f"{attention}core_attention.indexer.linear_wq_b.weight": (8, 8),
        f"{attention}core_attention.softmax_offset": (4,),
        "decoder.layers.1.mixer.in_proj.weight": (70, 24),
        "decoder.layers.1.mixer.conv1d_weight": (40, 1, 4),
        "decoder.layers.1.mixer.out_proj.weight": (24, 32),
        "decoder.layers.2.mlp.experts.weight1": (24, 80),
        "decoder.layers.2.mlp.experts.weight2": (40, 24),
        "decoder.layers.2.mlp.experts.linear_fc1.bias": (2, 40),
        "decoder.layers.2.mlp.experts.linear_fc2.bias1": (24,),
        "decoder.layers.2.mlp.shared_experts.linear_fc2.weight": (24, 40),
        "decoder.layers.2.mlp.shared_experts.gate_weight": (1, 24),
        "decoder.layers.2.mlp.fc1_latent_proj.weight": (12, 24),
    }
    layouts = tag_layouts(shapes, config)
    # Two tensor-parallel ranks, each [query | key | value | z | beta | alpha] of its own heads.
    one_rank = ["qk"] * (4 + 4) + ["vo"] * (12 + 12) + ["other"] * (2 + 2)
    assert row_groups(layouts[f"{attention}in_proj.weight"], (72, 24)) == 2 * one_rank
    groups = {name: layout.groups for name, layout in layouts.items()}
    vo, mlp = (
        {f"{attention}out_proj.weight"},
        {name for name in shapes if re.search(r"fc2\.weight|weight[12]|lat", name)},
    )
    for name in shapes.keys() - {f"{attention}in_proj.weight"}:
        expected = "vo" if name in vo else "mlp" if name in mlp else "other"
        assert groups[name] == (expected,), name


ROWS = 2 * (["qk"] * 18 + ["vo"] * 6)  # two query groups of [2 queries | key | value], heads of 6
ADAPTERS: dict[str, tuple[tuple[int, ...], list[str]]] = {  # name in a layer -> shape, groups of the rows
    "self_attention.linear_qkv.to_wrap.weight": ((48, 24), ROWS),
    "self_attention.linear_qkv.adapter.linear_in.weight": ((8, 24), ["vo"] * 8),  # feeds queries, keys and values
    "self_attention.linear_qkv.adapter.linear_out.weight": ((48, 8), ROWS),
    "self_attention.linear_qkv.adapter.weight_magnitude": ((48,), ROWS),
    "self_attention.linear_qkv.adapters.1.linear_out.weight": ((48, 8), ROWS),  # one of several
    "self_attention.linear_qkv.adapter.adapter_q.linear_in.weight": ((8, 24), ["qk"] * 8),  # canonical LoRA
    "self_attention.linear_qkv.adapter.adapter_k.linear_out.weight": ((12, 8), ["qk"] * 12),
    "self_attention.linear_qkv.adapter.adapter_v.linear_in.weight": ((8, 24), ["vo"] * 8),
    "self_attention.linear_proj.adapter.linear_in.weight": ((8, 24), ["vo"] * 8),
    "mlp.linear_fc1.adapter.adapter_gate.linear_out.weight": ((40, 8), ["mlp"] * 40),
    "mlp.experts.linear_fc2.adapter.linear_in.weight": ((4, 8, 40), ["mlp"] * 4),
    "mlp.router.adapter.linear_out.weight": ((4, 8), ["other"] * 4),
    "mixer.in_proj.adapter.linear_out.weight": ((50, 8), ["other"] * 50),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_megatron_bridge_follow_what_they_adapt(name: str) -> None:
    """Names and shapes are those of Megatron-Bridge's sources (bridge/peft); it needs Transformer Engine to run."""
    shape, rows = ADAPTERS[name]
    full = f"decoder.layers.0.{name}"
    layout = tag_layouts({full: shape}, {**SMALL, "num_query_groups": 2})[full]
    assert row_groups(layout, (shape[0], math.prod(shape[1:]))) == rows


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_fused_down_projection_of_mla_is_in_local_order(ranks: int) -> None:
    """FusedMLASelfAttention splits each rank's rows into [query | latent and rotary key]."""
    config = {**MLA, "q_lora_rank": 8, "kv_lora_rank": 6, "qk_pos_emb_head_dim": 6, "tensor_model_parallel_size": ranks}
    query, both = torch.zeros(8), torch.tensor([1] * 6 + [0] * 6)  # 1: the latent
    stored = torch.cat([torch.cat(pair) for pair in zip(query.chunk(ranks), both.chunk(ranks), strict=True)])
    name = "decoder.layers.0.self_attention.linear_qkv_down_proj.weight"
    layout = tag_layouts({name: (20, 24)}, config)[name]
    assert row_groups(layout, (20, 24)) == ["vo" if latent else "qk" for latent in stored.tolist()]


# ------------------------------------------------------------------------------------------- whole models, and errors


def test_tied_weights_count_once_and_wrappers_do_not_matter() -> None:
    from megatron.core.transformer.module import Float16Module

    model = make_gpt(**SMALL, tied=True, bf16=True, params_dtype=torch.bfloat16)
    table = tag_table(model)
    assert "head" not in table.elements and table.elements["embedding"] == 32 * 24
    wrapped = tag_table([Float16Module(model.config, model)])
    assert wrapped.elements == table.elements
    assert set(wrapped.shapes) == {f"module.{name}" for name in table.shapes}
    for parameter in model.embedding.parameters():
        parameter.requires_grad_(False)
    assert "embedding" not in tag_table(model).elements


def test_user_rules_come_first() -> None:
    model = make_gpt(**SMALL, num_moe_experts=2, moe_router_topk=2)
    rules = [["router", "other_router"], [r"^decoder\.layers\.0\.self_attention\.linear_qkv", "vo"]]
    table = tag_table(model, rules=rules)
    assert table.elements["other_router"] == 2 * 24
    assert "qk" not in table.elements
    with pytest.raises(MolsConfigError, match="matches no trainable parameter"):
        tag_table(model, rules=[["lm_head", "head"]])


def test_a_heterogeneous_model_has_a_config_for_each_layer() -> None:
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig

    def block(heads_in_group: int | None) -> dict[str, Any]:
        attention = {"no_op": False, "replace_with_linear": heads_in_group is None, "n_heads_in_group": heads_in_group}
        return {"attention": attention, "ffn": {"no_op": False, "replace_with_linear": False, "ffn_mult": 2.0}}

    text = json.dumps({"block_configs": [block(4), block(2), block(None)]})
    config = HeterogeneousTransformerConfig(
        **{**SMALL, "num_layers": 3}, kv_channels=6, heterogeneous_layers_config_encoded_json=text
    )
    name = "decoder.layers.{}.self_attention.linear_qkv.weight"
    linear = "decoder.layers.2.self_attention.weight"
    layouts = tag_layouts({name.format(0): (36, 24), name.format(1): (48, 24), linear: (24, 24)}, config)
    assert row_groups(layouts[name.format(0)], (36, 24)) == ["qk"] * 30 + ["vo"] * 6
    assert row_groups(layouts[name.format(1)], (48, 24)) == 2 * (["qk"] * 18 + ["vo"] * 6)
    assert layouts[linear].groups == ("vo",)


QKV = "decoder.layers.7.self_attention.linear_qkv.weight"
BAD: list[tuple[str, tuple[int, int], dict[str, Any] | None, str]] = [
    (QKV, (72, 24), {**SMALL, "num_query_groups": 3}, "num_query_groups=3 does not divide num_attention_heads=4"),
    (QKV, (70, 24), {**SMALL, "num_query_groups": 4}, "70 rows, but the TransformerConfig gives 72"),
    (QKV, (36, 24), {**SMALL}, "36 rows, but the TransformerConfig gives 72"),  # a TP shard is not the logical shape
    (QKV, (72, 24), {**SMALL, "attention_output_gate": True}, "gives 96"),
    (QKV, (72, 24), None, "no TransformerConfig was given"),
    (QKV, (72, 24), {"hidden_size": 24}, "num_attention_heads"),
    (QKV.replace("qkv", "kv"), (72, 24), SMALL, "gives 48 = 4 heads"),
    (QKV.replace("qkv", "kv_up_proj"), (48, 10), {**SMALL, **MLA}, "gives 44"),
    (QKV.replace("qkv", "kv_down_proj"), (10, 24), {**SMALL, **MLA}, "gives 14"),
    (QKV.replace("qkv", "qkv_down_proj"), (14, 24), {**SMALL, **MLA}, "q_lora_rank"),
    (
        QKV.replace("qkv", "qkv_down_proj"),
        (21, 24),
        {**SMALL, **MLA, "q_lora_rank": 7, "tensor_model_parallel_size": 2},
        "tensor_model_parallel_size=2 does not divide q_lora_rank=7",
    ),
    ("decoder.layers.7.self_attention.surprise.weight", (8, 8), SMALL, "no rule matches"),
]


@pytest.mark.parametrize(("name", "shape", "config", "message"), BAD)
def test_rows_that_do_not_add_up_name_the_parameter(
    name: str, shape: tuple[int, int], config: dict[str, Any] | None, message: str
) -> None:
    with pytest.raises(MolsConfigError, match=re.escape(message)) as error:
        tag_layouts({name: shape}, config)
    assert name in str(error.value)


def test_a_refusal_names_every_kind_with_rules_that_settle_it() -> None:
    shapes = {f"decoder.layers.{n}.self_attention.{name}.weight": (8, 8) for n in range(3) for name in ("odd", "rare")}
    shapes |= {f"decoder.layers.1.mlp.experts.local_experts.{n}.surprise.weight": (8, 8) for n in range(12)}
    shapes |= {QKV: (70, 24), QKV.replace("7", "8"): (70, 24)}
    with pytest.raises(MolsConfigError) as error:
        tag_layouts(shapes, SMALL)
    message = str(error.value)
    for kind in ("self_attention.odd", "self_attention.rare", "local_experts.N.surprise", "70 rows"):
        assert kind in message
    assert "\n" not in message
    block = re.search(r'"rules": (\[\[.*?\]\])', message)
    assert block is not None
    rules = json.loads(block[1])
    assert len(rules) == 4
    assert {layout.groups for layout in tag_layouts(shapes, SMALL, rules).values()} == {("other",)}


def test_tag_table_refuses_pieces_of_a_model() -> None:
    model = make_gpt(**SMALL)
    with pytest.raises(MolsConfigError, match="not 2 chunks"):
        tag_table([model, model])
    with pytest.raises(MolsConfigError, match="tensor_model_parallel_size=2"):
        tag_table(model, {**SMALL, "tensor_model_parallel_size": 2})
