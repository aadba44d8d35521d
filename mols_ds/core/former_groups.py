"""Find the rules that keep the module groups of a checkpoint from release 0.4.0.

0.4.0 matched only the last component of a name. Its rules are below. Layouts of fused projections have not changed
since, except for projections that 0.4.0 did not know.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence

from mols_ds.core.group_rules import canonical_name, strip_wrappers
from mols_ds.core.groups import GroupTable, layer_key
from mols_ds.core.layout import ElementLayout, base_group
from mols_ds.core.param_names import kind_pattern
from mols_ds.core.towers import TOWER_NAMES
from mols_ds.core.user_rules import AS_WEIGHT, UserRule


def _last(names: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|\.)(?:{names})(?:\.weight)?$")


_FORMER: tuple[tuple[re.Pattern[str], str | None], ...] = (  # None: unchanged
    (re.compile(r"(?:^|[._])bias$"), "other"),
    (
        _last(r"wte|wpe|embed_tokens|embed_in|embed_positions|\w+_embeddings?|tok_emb|pos_emb|token_emb|embeddings?"),
        "embedding",
    ),
    (_last(r"lm_head|embed_out|output_layer"), "head"),
    (_last(r"router|router\.\w+|shared_expert_gate|wg|gate"), None),
    (_last(r"c_attn|query_key_value|qkv_proj|kv_a_proj_with_mqa|kv_b_proj|in_proj_weight"), None),
    (_last(r"q_proj|k_proj|q_a_proj|q_b_proj|q_attn|wq|wk"), "qk"),
    (_last(r"v_proj|o_proj|out_proj|wv|wo"), "vo"),
    (_last(r"\w*(?:attn|attention)\.(?:query|key)"), "qk"),
    (_last(r"\w*(?:attn|attention)\.(?:value|c_proj|dense|proj)"), "vo"),
    (_last(r"gate_proj|up_proj|down_proj|gate_up_proj|c_fc|fc1|fc2|fc_in|fc_out|dense_h_to_4h|dense_4h_to_h"), "mlp"),
    (_last(r"w1|w2|w3|linear1|linear2|mlp\.c_proj|experts"), "mlp"),
)
_MEGATRON = re.compile(r"\.linear_(?:qkv|proj|fc1)\.")
_MEGATRON_BIAS = re.compile(
    r"\.(?:linear_(?:qkv|kv|kv_down_proj|kv_up_proj|qkv_down_proj)|self_attention\.in_proj)\.bias$"
)


def former_rules(
    table: GroupTable, rules: Sequence[Sequence[str]], saved: Mapping[str, object]
) -> list[tuple[str, str]]:
    """Return the rules that give a model its groups of release 0.4.0.

    Args:
        table: current groups of the model.
        rules: the user's rules behind `table`.
        saved: module group -> element count in the checkpoint.

    Returns:
        (regular expression, target) per kind of parameter that moved, to append to the user's rules. Empty where these
        rules do not reproduce the counts in `saved`.
    """
    mine = [UserRule(position, rule, TOWER_NAMES) for position, rule in enumerate(rules)]
    layered = any(base_group(group) != group for group in table.elements)
    megatron = any(_MEGATRON.search(name) for name in table.layouts)
    moved: dict[str, str] = {}
    counts: dict[str, int] = {}
    for name, layout in table.layouts.items():
        names = (name, strip_wrappers(name), canonical_name(name).name)
        target = None if any(rule.matches(names) for rule in mine) else _former(name, table, megatron)
        former = layout if target is None else _placed(target, name, table)
        if former is not None and layered and target is not None:
            former = former.relabel(layer_key(name))
        if former is None:
            return []
        if former != layout and target is not None:
            moved[kind_pattern(name)] = target
        for group, count in former.counts(0, math.prod(table.shapes[name])).items():
            counts[group] = counts.get(group, 0) + count
    return list(moved.items()) if counts == dict(saved) else []


def _former(name: str, table: GroupTable, megatron: bool) -> str | None:
    """Return the target of a rule that restores 0.4.0's group; None where 0.4.0 did the same, or raised."""
    if megatron:
        head = "other" if name.endswith("binary_head.weight") else None
        return AS_WEIGHT if _MEGATRON_BIAS.search(name) else head
    canonical = canonical_name(name)
    if len(table.shapes[name]) < 2 and canonical.adapter is None:
        return None
    found = next((group or "*" for regex, group in _FORMER if regex.search(canonical.name)), None)
    in_tower = any("." in base_group(group) for group in table.layouts[name].groups)
    return None if found == "*" and not in_tower else found


def _placed(target: str, name: str, table: GroupTable) -> ElementLayout | None:
    """Return the layout from a rule with this target, without layer numbers."""
    layout = table.layouts[name].relabel(base_group)
    if target == AS_WEIGHT:
        weight = table.layouts.get(re.sub(r"bias$", "weight", name))
        return None if weight is None else ElementLayout(1, weight.relabel(base_group).pattern)
    if target == "*":
        return layout.relabel(lambda group: group.rpartition(".")[2])
    return ElementLayout.whole(target)


def advice(table: GroupTable, rules: Sequence[Sequence[str]], saved: Mapping[str, object]) -> str:
    """Return advice, in one line, for resuming from a checkpoint with other module groups.

    Args:
        table: the groups of this run.
        rules: the user's rules of this run.
        saved: group -> elements in the checkpoint.
    """
    found = former_rules(table, rules, saved)
    if not found:
        return "use the model, mols.rules and mols.granularity of the run that saved it"
    block = json.dumps([*([list(rule) for rule in rules]), *([list(rule) for rule in found])])
    return (
        f'release 0.4.0 placed {len(found)} kinds of weight otherwise; these rules keep its grouping: "rules": {block}'
    )
