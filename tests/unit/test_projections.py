"""Groups of projections by their names: without blocks, in modules of any name, fused, in wrappers."""

from __future__ import annotations

import math
import re

import pytest

from mols_ds.core.groups import ElementLayout, build_layouts
from mols_ds.errors import MolsConfigError

whole = ElementLayout.whole


@pytest.mark.parametrize("name", ["{}", "model.{}", "3.{}", "module.net.0.{}", "layers.1.{}", "blocks.0.{}"])
def test_projections_of_a_model_without_blocks(name: str) -> None:
    """Nothing else tells what they are; each may be alone."""
    for leaf, group in (("q_proj", "qk"), ("v_proj", "vo"), ("o_proj", "vo"), ("up_proj", "mlp"), ("gate_proj", "mlp")):
        (layout,) = build_layouts({f"{name.format(leaf)}.weight": (8, 8)}, None).values()
        assert layout.groups == (group,)


@pytest.mark.parametrize("parent", ["first.", "body.unit_1.", "module.base_model.model.first."])
def test_projections_in_a_module_that_no_rule_knows(parent: str) -> None:
    """Their siblings tell what the module is; a projection without them is refused."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    layouts = build_layouts({f"{parent}{name}.weight": (8, 8) for name in names}, None)
    assert [layout.groups for layout in layouts.values()] == [(g,) for g in ("qk", "qk", "vo", "vo", *["mlp"] * 3)]
    few = build_layouts({f"{parent}{name}.weight": (8, 8) for name in ("q_proj", "v_proj", "up_proj")}, None)
    assert [layout.groups for layout in few.values()] == [("qk",), ("vo",), ("mlp",)]
    with pytest.raises(MolsConfigError, match="gate_proj"):  # maybe an attention's gate
        build_layouts({f"{parent}{name}.weight": (8, 8) for name in ("q_proj", "v_proj", "gate_proj")}, None)
    for alone in ("o_proj", "gate_proj"):
        with pytest.raises(MolsConfigError, match=f"no rule matches '{parent}{alone}.weight'"):
            build_layouts({f"{parent}{alone}.weight": (8, 8)}, None)
    inside = build_layouts({f"layers.0.indexer.{name}.weight": (8, 8) for name in names}, None)
    assert {layout.groups for layout in inside.values()} == {("other",)}


@pytest.mark.parametrize("key", ["num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_kv_head", "n_query_groups"])
@pytest.mark.parametrize("name", ["h.0.attn.qkv.weight", "h.0.attn.Wqkv.weight", "h.0.attn.c_attn.weight"])
def test_grouped_queries_by_the_names_of_other_frameworks(key: str, name: str) -> None:
    """4 heads of 3 features and one of keys and values: 12 + 3 rows of queries and keys, 3 of values."""
    config = {"n_head": 4, "n_embd": 12, key: 1}
    assert build_layouts({name: (18, 12)}, config)[name].pattern == ((15, "qk"), (3, "vo"))


def test_torchtitans_rows_of_each_key_value_head() -> None:
    """2 key-value heads with 2 heads of queries each, of 3 features: 9 rows of queries and keys, 3 of values."""
    name = "layers.0.attention.qkv_linear.wqkv.weight"
    config = {"first_attention": {"n_heads": 4, "n_kv_heads": 2}}
    assert build_layouts({name: (24, 12)}, config)[name].pattern == ((9, "qk"), (3, "vo"))
    equal = {"first_attention": {"n_heads": 4, "n_kv_heads": None}}
    assert build_layouts({name: (36, 12)}, equal)[name].pattern == ((6, "qk"), (3, "vo"))


def test_torchs_attention_in_a_module_of_any_name() -> None:
    shapes = {"layers.0.cross.in_proj_weight": (24, 8), "layers.0.cross.out_proj.weight": (8, 8)}
    found = build_layouts(shapes, None)
    assert found["layers.0.cross.in_proj_weight"].pattern == ((16, "qk"), (8, "vo"))
    assert found["layers.0.cross.out_proj.weight"].groups == ("vo",)


def test_biases_go_with_their_weights_also_where_these_are_norms() -> None:
    shapes = {"h.0.attn.q_proj.bias": (8,), "h.0.attn.q_proj.weight": (8, 8), "h.0.ln_1.bias": (8,)}
    found = build_layouts(shapes, None, [["bias$", "=weight"]])
    assert [layout.groups for layout in found.values()] == [("qk",), ("qk",), ("other",)]


@pytest.mark.parametrize(
    ("name", "shape", "config", "message"),
    [
        ("h.0.query_key_value.weight", (24, 8), None, "no model config was given"),
        ("h.0.query_key_value.weight", (24, 8), {"model_type": "unheard_of"}, "unheard_of"),
        ("h.0.query_key_value.weight", (24, 8), {"model_type": "gpt_neox"}, "num_attention_heads"),
        (
            "h.0.query_key_value.weight",
            (32, 8),
            {"model_type": "gpt_neox", "num_attention_heads": 2, "hidden_size": 8},
            "32 output features, but the model's config gives 24",
        ),
        ("h.0.qkv_proj.weight", (24, 8), None, "no model config was given"),
        ("h.0.qkv_proj.weight", (24, 8), {"model_type": "unheard_of"}, "unheard_of"),
        ("h.0.kv_b_proj.weight", (24, 8), {"num_attention_heads": 2}, "qk_nope_head_dim"),
        ("h.0.kv_a_proj_with_mqa.weight", (24, 8), {"kv_lora_rank": 16, "qk_rope_head_dim": 4}, "gives 20"),
        ("h.0.kv_a_proj_with_mqa.weight", (24, 8), {"kv_lora_rank": 0, "qk_rope_head_dim": 4}, "kv_lora_rank=0"),
        ("h.0.attn.c_attn.weight", (8, 25), None, "not queries, keys and values of equal size"),
    ],
)
def test_a_fused_weight_that_does_not_fit_its_config(
    name: str, shape: tuple[int, ...], config: dict[str, object] | None, message: str
) -> None:
    with pytest.raises(MolsConfigError, match=message) as error:
        build_layouts({name: shape}, config)
    assert repr(name) in str(error.value) and "rule" in str(error.value)
    assert build_layouts({name: shape}, config, [(re.escape(name), "qk")]) == {name: whole("qk")}, "the rule works"


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "h.0.kv_a_proj_with_mqa.weight",
            {"kv_lora_rank": "llama"},
            "kv_lora_rank='llama', which is not a whole number",
        ),
        ("h.0.query_key_value.weight", {"model_type": "gpt_neox", "n_head": 2, "head_dim": [4]}, r"head_dim=\[4\]"),
        ("h.0.gate.weight", {"num_experts": math.inf}, "num_experts"),
    ],
)
def test_a_config_value_that_is_no_number(name: str, config: dict[str, object], message: str) -> None:
    with pytest.raises(MolsConfigError, match=message):
        build_layouts({name: (24, 8)}, config)


HOLDERS = {
    "mixer.layers.0.self_attn.q_proj": "qk",
    "rnn.layers.1.mlp.up_proj": "mlp",
    "conv.attn.o_proj": "vo",
    "mamba.blocks.2.v_proj": "vo",
    "mamba.layers.0.mixer.in_proj": "other",
    "layers.0.mamba.in_proj": "other",
    "layers.0.conv.in_proj": "other",
}


@pytest.mark.parametrize(("name", "group"), HOLDERS.items())
def test_what_holds_attention_an_mlp_or_layers_is_no_mixer(name: str, group: str) -> None:
    assert build_layouts({f"{name}.weight": (8, 8)}, None)[f"{name}.weight"] == whole(group)


@pytest.mark.parametrize("fused", ["Wqkv", "qkv"])
def test_flash_attns_attention_is_called_mixer(fused: str) -> None:
    layer = "transformer.layers.0.mixer"
    shapes = {f"{layer}.{fused}.weight": (24, 8), f"{layer}.out_proj.weight": (8, 8), f"{layer}.{fused}.bias": (24,)}
    found = build_layouts(shapes, None)
    assert found[f"{layer}.{fused}.weight"].pattern == ((16, "qk"), (8, "vo"))
    assert found[f"{layer}.out_proj.weight"] == whole("vo") and found[f"{layer}.{fused}.bias"] == whole("other")
    alone = build_layouts({f"{layer}.out_proj.weight": (8, 8)}, None)
    assert alone[f"{layer}.out_proj.weight"] == whole("other"), "a Mamba mixer's"


@pytest.mark.parametrize("beside", ["in_proj_weight", "Wqkv.weight", "qkv.weight"])
def test_out_proj_beside_fused_projections(beside: str) -> None:
    """In a module that no rule knows; what is beside it needs a rule of its own there."""
    shapes = {"layers.0.odd.out_proj.weight": (8, 8), f"layers.0.odd.{beside}": (24, 8)}
    found = build_layouts(shapes, None, [["in_proj_weight|qkv", "other"]])
    assert found["layers.0.odd.out_proj.weight"] == whole("vo")


def test_shared_is_an_embedding_outside_of_layers() -> None:
    shapes = dict.fromkeys(("shared.weight", "transformer.shared.weight", "0.shared.weight"), (30, 8))
    shapes |= dict.fromkeys(("layers.3.mlp.shared.weight", "layers.3.mlp.shared.up_proj.weight"), (8, 8))
    groups = [layout.groups for layout in build_layouts(shapes, None).values()]
    assert groups == [("embedding",)] * 3 + [("mlp",)] * 2
    with pytest.raises(MolsConfigError, match=r"no rule matches 'layers\.3\.shared.weight'"):
        build_layouts({"layers.3.shared.weight": (8, 8)}, None)


def test_transform_is_berts_head_only() -> None:
    names = ("cls.predictions.transform.dense.weight", "transform.layers.0.attn.q_proj.weight")
    assert list(build_layouts(dict.fromkeys(names, (8, 8)), None).values()) == [whole("other"), whole("qk")]


NAMES = ["h.0.attn.qkv.weight", "h.0.attn.Wqkv.weight", "h.0.attn.c_attn.weight"]


@pytest.mark.parametrize("config", [None, {}, {"n_head": 4, "n_embd": 12, "kv": 1}])
@pytest.mark.parametrize("name", NAMES)
def test_grouped_queries_that_the_config_does_not_tell_are_refused(name: str, config: dict[str, object] | None) -> None:
    """18 rows for a width of 12: thirds would be wrong. Equal parts, also of wider heads, need no number."""
    with pytest.raises(MolsConfigError, match=rf"{name}' of shape \[18, 12\].*num_key_value_heads.*\"rules\": \[\["):
        build_layouts({name: (18, 12)}, config)
    assert build_layouts({name: (18, 12)}, config, [["attn", "other"]])[name] == whole("other")
    assert build_layouts({name: (36, 12)}, config)[name].pattern == ((24, "qk"), (12, "vo"))
    wide = {"num_attention_heads": 2, "head_dim": 16, "hidden_size": 12}
    assert build_layouts({name: (96, 12)}, wide)[name].pattern == ((64, "qk"), (32, "vo"))
    adapter = name.replace("weight", "lora_B.default.weight")
    assert build_layouts({adapter: (18, 2)}, config)[adapter].pattern == ((12, "qk"), (6, "vo"))


def test_gpt2_has_no_grouped_queries_whatever_its_config_says() -> None:
    config = {"n_head": 4, "n_embd": 12, "num_key_value_heads": 1}
    assert build_layouts({NAMES[2]: (12, 36)}, config)[NAMES[2]].pattern == ((24, "qk"), (12, "vo"))


@pytest.mark.parametrize("wrapper", ["_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
def test_modules_of_activation_checkpointing_and_fsdp_do_not_matter(wrapper: str) -> None:
    inside = f"layers.0.{wrapper}.self_attn"
    shapes = {
        f"{wrapper}.model.{inside}.{wrapper}.q_proj.weight": (8, 8),
        f"module.{inside}.v_proj.lora_A.default.weight": (2, 8),
        f"{inside}.out_proj.weight": (8, 8),
        f"layers.0.{wrapper}.odd.out_proj.weight": (8, 8),
        "layers.0.odd.in_proj_weight": (24, 8),
    }
    rules = [[r"^model\.layers\.0\.self_attn\.q_proj", "qk"]]
    found = [layout.groups for layout in build_layouts(shapes, None, rules, "layer_type").values()]
    assert found == [("qk.0",), ("vo.0",), ("vo.0",), ("vo.0",), ("qk.0", "vo.0")]
