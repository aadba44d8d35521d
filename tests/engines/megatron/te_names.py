"""The names that Transformer Engine's layer specs give to the parameters of a vanilla-spec model.

Transformer Engine does not run without a GPU, so the names are derived from those of a real vanilla-spec model, by what
megatron/core/models/gpt/gpt_layer_specs.py and extensions/transformer_engine.py do differently:
- LayerNormColumnParallelLinear has the norm before it as `layer_norm_weight` and `layer_norm_bias`;
- GroupedLinear has the weight of each expert as `weight0`, `weight1`..., or all in one `weight` (0.19);
- FusedMLASelfAttention (0.17 on) has one down projection for queries, keys and values, norm included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

Shapes = dict[str, tuple[int, ...]]


def te_shapes(
    vanilla: Mapping[str, tuple[int, ...]],
    experts: Literal["sequential", "grouped", "single"] = "grouped",
    fused_down: bool = False,
) -> Shapes:
    """Name -> shape of the Transformer Engine counterpart of a vanilla-spec model (name -> shape)."""
    shapes: Shapes = {}
    stacks: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in vanilla.items():
        renamed = _norm(name, vanilla, fused_down)
        expert = re.fullmatch(r"(.*\.experts)\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)", renamed)
        if expert and experts == "grouped":
            renamed = f"{expert[1]}.{expert[3]}.{expert[4]}{expert[2]}"
        elif expert and experts == "single":
            stacks.setdefault(f"{expert[1]}.{expert[3]}.{expert[4]}", []).append(shape)
            continue
        if fused_down and renamed.endswith(".linear_q_down_proj.weight"):
            continue
        if fused_down and renamed.endswith(".linear_kv_down_proj.weight"):
            query = vanilla[name.replace("linear_kv_down_proj", "linear_q_down_proj")]
            renamed = renamed.replace("linear_kv_down_proj", "linear_qkv_down_proj")
            shape = (query[0] + shape[0], shape[1])
        shapes[renamed] = shape
    for name, members in stacks.items():
        shapes[name] = (len(members), *members[0])
    return shapes


def _norm(name: str, vanilla: Mapping[str, tuple[int, ...]], fused_down: bool) -> str:
    """Return the name of a norm inside Transformer Engine's next linear layer; other names unchanged."""
    match = re.fullmatch(r"(.*?)\.((?:self_attention\.)?\w+_layernorm)\.(weight|bias)", name)
    if match is None:
        return name
    layer, norm, leaf = match.groups()
    behind = {
        "input_layernorm": "self_attention.linear_qkv",
        "pre_mlp_layernorm": "mlp.linear_fc1",  # a MoE layer keeps its norm: it has no mlp.linear_fc1
        "self_attention.q_layernorm": "self_attention.linear_q_up_proj",
        "self_attention.kv_layernorm": "self_attention.linear_kv_up_proj",
    }
    if fused_down:
        behind["input_layernorm"] = "self_attention.linear_qkv_down_proj"
    linear = behind.get(norm)
    # Norms stay where they are in front of anything else (MLA's separate down projections, norms of queries and keys).
    if linear is None or (f"{layer}.{linear}.weight" not in vanilla and not (fused_down and norm == "input_layernorm")):
        return name
    return f"{layer}.{linear}.layer_norm_{leaf}"
