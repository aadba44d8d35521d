"""Ordered rules, tied weights, granularity, the group table, and what a user can get wrong."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mols_ds.core.groups import (
    GROUPS,
    SCALED_GROUPS,
    ElementLayout,
    GroupRow,
    base_group,
    build_layouts,
    format_group_table,
    group_table,
    is_scaled,
    order_groups,
)
from mols_ds.errors import MolsConfigError

whole = ElementLayout.whole
NANO = {  # names and nn.Linear shapes of nanoGPT, width 8
    "transformer.wte.weight": (30, 8),
    "transformer.wpe.weight": (16, 8),
    "transformer.h.0.ln_1.weight": (8,),
    "transformer.h.0.attn.c_attn.weight": (24, 8),
    "transformer.h.0.attn.c_attn.bias": (24,),
    "transformer.h.0.attn.c_proj.weight": (8, 8),
    "transformer.h.0.mlp.c_fc.weight": (32, 8),
    "transformer.h.0.mlp.c_proj.weight": (8, 32),
    "lm_head.weight": (30, 8),
}


def tiny(tied: bool = False, layers: int = 2) -> nn.Module:
    """Parameters named and shaped as in transformers' LLaMA: vocabulary 40, width 8, inner width 12."""

    def linear(rows: int, columns: int) -> nn.Module:
        return nn.Linear(columns, rows, bias=False)

    def norm() -> nn.Module:
        return nn.LayerNorm(8, bias=False)

    def layer() -> nn.Module:
        attention = {name: linear(8, 8) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        mlp = {"gate_proj": linear(12, 8), "up_proj": linear(12, 8), "down_proj": linear(8, 12)}
        parts = {"self_attn": nn.ModuleDict(attention), "mlp": nn.ModuleDict(mlp)}
        return nn.ModuleDict({**parts, "input_layernorm": norm(), "post_attention_layernorm": norm()})

    with torch.device("meta"):
        stack = nn.ModuleList([layer() for _ in range(layers)])
        inner = nn.ModuleDict({"embed_tokens": nn.Embedding(40, 8), "layers": stack, "norm": norm()})
        model = nn.ModuleDict({"model": inner, "lm_head": linear(40, 8)})
    if tied:
        model["lm_head"].weight = model["model"]["embed_tokens"].weight
    return model


# --------------------------------------------------------------------------------------------------- rules and presets


def test_a_plain_gpt_without_a_transformers_config() -> None:
    layouts = build_layouts(NANO, None)
    assert list(layouts) == list(NANO)
    assert layouts["transformer.h.0.attn.c_attn.weight"] == ElementLayout(8, ((16, "qk"), (8, "vo")))
    assert layouts["transformer.h.0.attn.c_attn.bias"] == whole("other")
    assert layouts["transformer.h.0.attn.c_proj.weight"] == whole("vo")
    assert layouts["transformer.h.0.mlp.c_proj.weight"] == layouts["transformer.h.0.mlp.c_fc.weight"] == whole("mlp")
    assert layouts["transformer.wpe.weight"] == layouts["transformer.wte.weight"] == whole("embedding")
    assert layouts["lm_head.weight"] == whole("head")
    assert layouts["transformer.h.0.ln_1.weight"] == whole("other")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model."])
def test_wrapper_prefixes_do_not_matter(prefix: str) -> None:
    rules = [(r"^transformer\.wpe", "other_positions")]
    plain = build_layouts(NANO, None, rules)
    wrapped = build_layouts({prefix + name: shape for name, shape in NANO.items()}, None, rules)
    assert wrapped == {prefix + name: layout for name, layout in plain.items()}


def test_user_rules_come_first_and_the_first_of_them_wins() -> None:
    rules = [(r"h\.0\.attn\.c_attn\.weight$", "mlp"), (r"attn", "other_attention"), (r"ln_1", "qk")]
    layouts = build_layouts(NANO, None, rules)
    assert layouts["transformer.h.0.attn.c_attn.weight"] == whole("mlp"), "a rule replaces a fused layout"
    assert layouts["transformer.h.0.attn.c_attn.bias"] == whole("other_attention")
    assert layouts["transformer.h.0.attn.c_proj.weight"] == whole("other_attention")
    assert layouts["transformer.h.0.ln_1.weight"] == whole("qk"), "a user may scale a norm"
    assert layouts["transformer.h.0.mlp.c_fc.weight"] == whole("mlp")


def test_own_groups() -> None:
    rules = [(r"mlp\.experts\.", "new:experts"), (r"wpe", "other_positions")]
    shapes = NANO | {"transformer.h.0.mlp.experts.gate_up_proj": (4, 16, 8)}
    layouts = build_layouts(shapes, None, rules)
    assert layouts["transformer.h.0.mlp.experts.gate_up_proj"] == whole("experts")
    assert is_scaled("experts") and is_scaled("experts.3") and is_scaled("otherwise")
    assert not is_scaled("other_positions") and not is_scaled("other")
    assert all(is_scaled(group) for group in SCALED_GROUPS) and set(GROUPS) - set(SCALED_GROUPS) == {"other"}


def test_a_weight_called_gate_is_a_router_only_with_one_row_per_expert() -> None:
    name = "model.layers.0.mlp.gate.weight"
    assert build_layouts({name: (8, 32)}, SimpleNamespace(num_local_experts=8))[name] == whole("other")
    with pytest.raises(MolsConfigError, match=r"mlp\.gate\.weight"):
        build_layouts({name: (64, 32)}, SimpleNamespace(num_local_experts=8))
    with pytest.raises(MolsConfigError, match=r"mlp\.gate\.weight"):
        build_layouts({name: (64, 32)}, None)


def test_the_config_may_be_a_mapping_or_hold_a_text_config() -> None:
    shapes = {"layers.0.attention.query_key_value.weight": (24, 8)}
    config = {"model_type": "gpt_neox", "hidden_size": 8, "num_attention_heads": 2}
    expected = {"layers.0.attention.query_key_value.weight": ElementLayout(8, ((8, "qk"), (4, "vo")))}
    assert build_layouts(shapes, config) == expected
    assert build_layouts(shapes, SimpleNamespace(model_type="both", text_config=config)) == expected


# ----------------------------------------------------------------------------------------------------------- the table


def test_group_table_of_a_small_model_by_hand() -> None:
    table = group_table(tiny(layers=2))
    # width 8, inner 12, vocabulary 40; q, k, v, o are 8 x 8; 2 norms a layer and 1 at the end
    expected = {"embedding": 320, "head": 320, "qk": 256, "vo": 256, "mlp": 576, "other": 40}
    assert table.elements == expected
    assert list(table) == [
        GroupRow(group, parameters, expected[group], expected[group] / 1768)
        for group, parameters in [("embedding", 1), ("head", 1), ("qk", 4), ("vo", 4), ("mlp", 6), ("other", 5)]
    ]
    assert table.shapes["model.layers.1.mlp.down_proj.weight"] == (8, 12)
    assert list(table.layouts) == list(table.shapes)


def test_tied_embeddings_are_one_embedding_group() -> None:
    table = group_table(tiny(tied=True))
    assert "head" not in table.elements
    assert table.elements["embedding"] == 320


class HeadFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(8, 40, bias=False)
        self.wte = nn.Embedding(40, 8)
        self.wte.weight = self.lm_head.weight


def test_tied_weights_whose_first_name_is_the_heads_are_embedding() -> None:
    table = group_table(HeadFirst())
    assert table.layouts == {"lm_head.weight": whole("embedding")}
    assert group_table(HeadFirst(), rules=[("wte", "mlp")]).layouts == {"lm_head.weight": whole("mlp")}


def test_only_trainable_parameters_count() -> None:
    model = tiny()
    model.get_parameter("model.embed_tokens.weight").requires_grad_(False)
    table = group_table(model)
    assert "embedding" not in table.elements and "model.embed_tokens.weight" not in table.layouts


def test_partitioned_parameters_count_with_their_logical_shape() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(8, 6)})])})
    weight = model.get_parameter("layers.0.q_proj.weight")
    weight.ds_shape = torch.Size((6, 8))  # what zero.Init leaves: the shape, and no data
    weight.data = torch.empty(0)
    assert group_table(model).elements == {"qk": 48, "other": 6}


def test_format_group_table() -> None:
    lines = format_group_table(group_table(tiny())).splitlines()
    assert lines[0].split() == ["group", "parameters", "elements", "share"]
    assert [line.split()[0] for line in lines[1:]] == [*GROUPS, "total"]
    assert lines[3].split() == ["qk", "4", "256", "14.48", "%"]
    assert lines[-1].split() == ["total", "21", "1,768", "100.00", "%"]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"


# --------------------------------------------------------------------------------------------------------- granularity


def test_layer_type_puts_the_layer_behind_the_group() -> None:
    table = group_table(tiny(layers=12), granularity="layer_type")
    layers = range(12)
    expected = ["embedding", "head", *(f"{group}.{i}" for group in ("qk", "vo", "mlp") for i in layers), "other"]
    assert [row.group for row in table] == expected, "ordered by number, not as text"
    assert table.elements["qk.11"] == 128
    assert base_group("qk.11") == "qk" and base_group("other") == "other"


def test_layer_type_keeps_fused_layouts_and_expert_numbers_apart() -> None:
    layouts = build_layouts(NANO, None, granularity="layer_type")
    assert layouts["transformer.h.0.attn.c_attn.weight"] == ElementLayout(8, ((16, "qk.0"), (8, "vo.0")))
    assert layouts["transformer.wpe.weight"] == whole("embedding")
    shapes = {
        "model.layers.7.block_sparse_moe.experts.3.w1.weight": (8, 8),
        "experts.3.w1.weight": (8, 8),
        "0.layers.4.q_proj.weight": (8, 8),
        "stack.5.q_proj.weight": (8, 8),
    }
    assert [layout.groups for layout in build_layouts(shapes, None, granularity="layer_type").values()] == [
        ("mlp.7",),
        ("mlp",),
        ("qk.4",),
        ("qk.5",),
    ]


def test_order_groups() -> None:
    keys = ["late", "other", "mlp.10", "mlp.9", "early", "qk", "embedding", "mlp", "mlp.9"]
    assert order_groups(keys) == ["embedding", "qk", "mlp", "mlp.9", "mlp.10", "other", "late", "early"]


# ----------------------------------------------------------------------------------------------------- user's mistakes


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("no_such_layer", "qk")], r"'no_such_layer'.*matches no trainable parameter"),
        ([("attn", "vo"), (r"c_attn\.weight", "qk")], r"c_attn.*earlier rules took"),
        ([("attn", "q k")], r"'q k' is not a group name.*embedding"),
        ([("attn", "qk.3")], r"'qk\.3' is not a group name"),
        ([("attn", "max")], r"'max' is not a group name"),
        ([("attn", "mpl")], r"'mpl' is not a group name; did you mean 'mlp'.*other_NAME.*\"new:mpl\""),
        ([("attn", "experts")], r"'experts' is not a group name.*allowed are embedding, head, qk.*new:"),
        ([("attn", "new:max")], r"'new:max' is not a group name"),
        ([("attn", "new:qk")], r"'new:qk' is not a group name"),
        ([("attn", "new:q k")], r"'new:q k' is not a group name"),
        ([("attn", "vision.qkv")], r"'vision\.qkv' is not a group name"),
        ([("attn(", "qk")], r"rules\[0\].*'attn\(' is not a regular expression"),
        ([("(" * 3000 + "a" + ")" * 3000, "qk")], r"rules\[0\].*is not a regular expression \(nested too deeply\)"),
        ([("a" * 10_001, "qk")], r"rules\[0\]: a pattern of 10,001 characters"),
        ([("attn",)], r"rules\[0\]"),
        (["attn"], r"rules\[0\]"),
        ([("attn", 3)], r"rules\[0\]"),
        ([("attn", "vo"), 3], r"rules\[1\]"),
        ("attn", r"rules"),
    ],
)
def test_a_bad_rule_is_named(rules: object, message: str) -> None:
    with pytest.raises(MolsConfigError, match=message) as error:
        build_layouts(NANO, None, rules)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def pasted(message: str) -> list[tuple[str, str]]:
    """The "rules" that a refusal gives, as a JSON file would have them."""
    block = json.JSONDecoder().raw_decode(message.partition('"rules": ')[2])[0]
    return [(pattern, group) for pattern, group in block]


def test_a_refusal_names_every_kind_and_its_rules_can_be_pasted() -> None:
    shapes = NANO | {f"transformer.h.{layer}.odd.weight": (8, 8) for layer in range(12)}
    shapes |= {"transformer.h.0.filter.weight": (8, 1, 4), "model.layers.3.self_attn.query_key_value.weight": (24, 8)}
    with pytest.raises(MolsConfigError) as error:
        build_layouts(shapes, None)
    message = str(error.value)
    assert "'transformer.h.N.odd.weight' of shape [8, 8] (12 of them)" in message and "\n" not in message
    assert "transformer.h.0.filter.weight" in message and "query_key_value" in message
    rules = pasted(message)
    assert len(rules) == 3
    layouts = build_layouts(shapes, None, rules)
    assert {layouts[name] for name in shapes if name not in NANO} == {whole("other")}
    assert {name: layouts[name] for name in NANO} == build_layouts(NANO, None), "nothing else moves"


def test_a_vector_of_several_dimensions_is_other_and_a_matrix_is_refused() -> None:
    assert build_layouts({"layers.0.scale": (1, 1, 8)}, None)["layers.0.scale"] == whole("other")
    with pytest.raises(MolsConfigError, match=r"layers\.0\.scale"):
        build_layouts({"layers.0.scale": (1, 2, 8)}, None)


def test_a_module_that_is_called_like_an_adapter_is_none() -> None:
    name = "poly_encoder.layers.0.self_attn.q_proj.weight"
    assert build_layouts({name: (8, 8)}, None) == {name: whole("qk")}
    assert build_layouts({f"{name[:-7]}.lora_A.default.weight": (2, 8)}, None).popitem()[1] == whole("qk")


def test_a_leaf_name_without_its_parent_decides_nothing() -> None:
    names = ("layers.0.odd.out_proj.weight", "layers.0.odd.gate_proj.weight", "layers.0.odd.dense.weight")
    with pytest.raises(MolsConfigError) as error:
        build_layouts({name: (8, 8) for name in names}, None)
    assert len(pasted(str(error.value))) == 3
    placed = {
        "layers.0.self_attn.gate_proj.weight": "vo",
        "layers.0.mlp.gate_proj.weight": "mlp",
        "layers.0.mixer.out_proj.weight": "other",
        "layers.0.mamba.in_proj.weight": "other",
        "layers.0.self_attn.indexer.wk.weight": "other",
        "layers.0.mlp.router.fc1.weight": "other",
        "layers.0.mlp.gate.router_mlp.fc1.weight": "other",
        "layers.0.ln_mlp.weight": "other",
    }
    shapes = {name: (8,) if "ln_" in name else (8, 8) for name in placed}
    assert {name: layout.groups[0] for name, layout in build_layouts(shapes, None).items()} == placed


def test_biases_are_other_unless_a_rule_asks_for_their_weights_rows() -> None:
    shapes = {"h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_attn.bias": (24,), "h.0.mlp.c_fc.bias": (32,)}
    assert build_layouts(shapes, None)["h.0.attn.c_attn.bias"] == whole("other")
    layouts = build_layouts(shapes, None, [("bias$", "=weight")])
    assert layouts["h.0.attn.c_attn.bias"] == ElementLayout(1, ((16, "qk"), (8, "vo")))
    assert layouts["h.0.mlp.c_fc.bias"] == whole("mlp")


def test_a_parameter_shared_by_modules_of_several_groups_is_refused() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(8, 8, bias=False)})])})
    model["layers"][0]["v_proj"] = model["layers"][0]["q_proj"]
    with pytest.raises(MolsConfigError, match=r"layers\.0\.q_proj\.weight.*several groups \(qk, vo\)"):
        group_table(model)
    assert group_table(model, [("q_proj", "qk")]).elements == {"qk": 64}


# -------------------------------------------------------------------------------------------------------------- towers


TOWER = {
    "model.vision_tower.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.vision_tower.layers.0.self_attn.q_proj.bias": (8,),
    "model.vision_tower.odd.weight": (8, 8),
    "model.multi_modal_projector.layers.0.mlp.fc1.weight": (8, 8),
    "model.language_model.layers.0.self_attn.q_proj.weight": (8, 8),
}


def test_a_tower_has_groups_of_its_own_which_are_not_scaled() -> None:
    groups = [layout.groups[0] for layout in build_layouts(TOWER, None, granularity="layer_type").values()]
    assert groups == ["vision.qk", "other", "other", "projector.mlp", "qk.0"]
    assert not is_scaled("vision.qk") and base_group("vision.qk") == "vision.qk"
    assert order_groups(["vision.qk", "other", "qk.1", "qk.0"]) == ["qk.0", "qk.1", "other", "vision.qk"]


def test_a_tower_alone_is_the_model_also_where_what_is_beside_it_is_frozen() -> None:
    alone = {name: shape for name, shape in TOWER.items() if "vision_tower.layers" in name}
    name = next(iter(alone))
    assert build_layouts(alone, None)[name] == whole("qk")
    assert build_layouts(alone, None, names=TOWER)[name] == whole("vision.qk")


def test_rules_scale_a_tower_or_name_one() -> None:
    layouts = build_layouts(TOWER, None, [("vision_tower.odd", "other"), ("vision_tower", "new:vision_*")])
    assert layouts["model.vision_tower.layers.0.self_attn.q_proj.weight"] == whole("vision_qk")
    assert layouts["model.vision_tower.layers.0.self_attn.q_proj.bias"] == whole("other")
    with pytest.raises(MolsConfigError, match=r"vision_tower\.odd"):
        build_layouts(TOWER, None, [("vision_tower", "new:vision_*")])
    lidar = {"lidar.layers.0.attn.q_proj.weight": (8, 8), "layers.0.attn.q_proj.weight": (8, 8)}
    assert build_layouts(lidar, None, [("^lidar", "vision.*")])["lidar.layers.0.attn.q_proj.weight"] == whole(
        "vision.qk"
    )
    everything = build_layouts(TOWER, None, [("vision_tower.layers", "*")])
    assert everything["model.vision_tower.layers.0.self_attn.q_proj.weight"] == whole("qk")


def test_rules_are_not_needed_for_frozen_weights() -> None:
    model = nn.ModuleDict({"mixer": nn.Linear(4, 4), "lm_head": nn.Linear(4, 9)})
    model["mixer"].requires_grad_(False)
    assert group_table(model).elements == {"head": 36, "other": 9}


def test_an_unknown_granularity_is_named() -> None:
    with pytest.raises(MolsConfigError, match=r"'layer'.*'layer_type'"):
        build_layouts(NANO, None, granularity="layer")  # type: ignore[arg-type]


def test_a_model_without_trainable_parameters() -> None:
    with pytest.raises(MolsConfigError, match="no trainable parameter"):
        group_table(nn.Linear(3, 3).requires_grad_(False))


def test_a_rule_that_runs_away_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mols_ds.core.user_rules.RULE_SECONDS", 0.2)
    model = nn.Module()
    model.register_parameter("a" * 60 + "_b", nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(MolsConfigError, match=r"rules: '\^\(a\|aa\)\+\$' takes more than 0.2 seconds"):
        group_table(model, [["^(a|aa)+$", "mlp"]])


def test_a_rule_that_is_slow_on_every_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mols_ds.core.user_rules.RULE_SECONDS_IN_ALL", 0.2)
    model = nn.ModuleDict({f"block{n}" + "a" * 22: nn.Linear(2, 2) for n in range(400)})
    with pytest.raises(MolsConfigError, match=r"takes more than 0.2 seconds on all parameter names"):
        group_table(model, [("(a|aa)+$", "mlp"), ("block", "qk")])
