"""Checkpoints of 0.4.0 whose module groups moved: the refusal gives rules that keep the old grouping."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch

from megatron_patches.group_rules import tag_layouts
from mols_ds.core.config import MolsConfig
from mols_ds.core.controller import Controller
from mols_ds.core.former_groups import advice, former_rules
from mols_ds.core.groups import GroupTable, build_layouts
from mols_ds.core.phases import Schedule
from mols_ds.core.protocols import Context
from mols_ds.errors import MolsCheckpointError

Shapes = dict[str, tuple[int, ...]]
LAYER: Shapes = {f"self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"} | {
    "mlp.gate_proj.weight": (12, 8),
    "mlp.up_proj.weight": (12, 8),
    "mlp.down_proj.weight": (8, 12),
    "input_layernorm.weight": (8,),
}
PLAIN: Shapes = {f"model.layers.{n}.{name}": shape for n in range(2) for name, shape in LAYER.items()}
PLAIN |= {"model.embed_tokens.weight": (40, 8), "lm_head.weight": (40, 8)}
GATED = PLAIN | {f"model.layers.{n}.self_attn.gate_proj.weight": (8, 8) for n in range(2)}
HYBRID = PLAIN | {
    "model.layers.2.mamba.in_proj.weight": (20, 8),
    "model.layers.2.mamba.out_proj.weight": (8, 10),
    "model.layers.2.self_attn.indexer.wk.weight": (4, 8),
}
TOWER = {f"language_model.{name}": shape for name, shape in PLAIN.items()}
TOWER |= {f"vision_tower.layers.0.{name}": shape for name, shape in LAYER.items()}

# Shapes, the user's rules, granularity, what 0.4.0 counted: by hand from its rules.
CASES: dict[str, tuple[Shapes, list[tuple[str, str]], str, dict[str, int]]] = {
    "attention gate": (
        GATED,
        [],
        "type",
        {"embedding": 320, "head": 320, "qk": 256, "vo": 256, "mlp": 576 + 128, "other": 16},
    ),
    "attention gate by layer": (
        GATED,
        [],
        "layer_type",
        {
            "embedding": 320,
            "head": 320,
            **{f"{group}.{n}": count for group, count in (("qk", 128), ("vo", 128), ("mlp", 352)) for n in range(2)},
            "other": 16,
        },
    ),
    "mixer and indexer, with rules": (
        HYBRID,
        [("in_proj", "other_mamba")],
        "type",
        {
            "embedding": 320,
            "head": 320,
            "qk": 256 + 32,
            "vo": 256 + 80,
            "mlp": 576,
            "other": 16,
            "other_mamba": 160,
        },
    ),
    "tower": (
        TOWER,
        [],
        "type",
        {"embedding": 320, "head": 320, "qk": 384, "vo": 384, "mlp": 864, "other": 24},
    ),
}


def table_of(shapes: Shapes, rules: Sequence[Sequence[str]], granularity: str) -> GroupTable:
    return GroupTable(build_layouts(shapes, None, rules, granularity), shapes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CASES)
def test_the_rules_keep_the_old_grouping(name: str) -> None:
    shapes, rules, granularity, former = CASES[name]
    table = table_of(shapes, rules, granularity)
    assert table.elements != former, "nothing moved"
    text = advice(table, rules, former)
    given = json.loads(text.partition('"rules": ')[2])
    assert given[: len(rules)] == [list(rule) for rule in rules] and "0.4.0" in text
    assert table_of(shapes, given, granularity).elements == former


def test_biases_of_megatron() -> None:
    config = {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 2, "hidden_size": 8}
    attention = "decoder.layers.0.self_attention."
    shapes: Shapes = {f"{attention}linear_qkv.weight": (16, 8), f"{attention}linear_qkv.bias": (16,)}
    shapes |= {f"{attention}linear_proj.weight": (8, 8), f"{attention}linear_proj.bias": (8,)}
    table = GroupTable(tag_layouts(shapes, config), shapes)
    former = {"qk": 12 * 9, "vo": 4 * 9 + 64, "other": 8}
    assert table.elements == {"qk": 96, "vo": 96, "other": 24}
    rules = former_rules(table, [], former)
    assert len(rules) == 1 and rules[0][1] == "=weight"
    assert GroupTable(tag_layouts(shapes, config, rules), shapes).elements == former


def test_another_model_gets_no_rules() -> None:
    text = advice(table_of(GATED, [], "type"), [], {"qk": 1})
    assert "rules and mols.granularity" in text and "0.4.0" not in text


def test_loading_names_the_rules() -> None:
    shapes, _, _, former = CASES["attention gate"]
    context = Context(lambda sums: sums, torch.device("cpu"), 0, {}, {}, log=lambda _: None)
    controller = Controller(MolsConfig(), table_of(shapes, [], "type"), [], Schedule(0, 1), context)
    saved = controller.state_dict() | {"groups": former}
    with pytest.raises(MolsCheckpointError, match=r'module groups.*"rules": \[\[.*gate_proj.*"mlp"\]\]'):
        controller.load_state_dict(saved)
