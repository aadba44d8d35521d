"""Layouts of fused projections, from the model's config: output features of queries, keys, values and gates.

Weights that feed both keys and values are `vo`: the latent part of MLA's `kv_a_proj_with_mqa`, DeepSeek-V4's shared
`kv_proj`, `lora_A` of a fused projection. Their gradient from the values is larger than from the keys while attention
is still flat. Output gates scale the values: `vo`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Pattern = tuple[tuple[int, str], ...]
"""(number of output features, group) in order. The pattern repeats over the output features of the parameter."""
PatternOf = Callable[[str, int, object | None], Pattern]
"""The functions below, from `thirds` to `mla_kv_b`, have these arguments and result.

Args:
    name: of the parameter, for messages.
    features: number of output features, its size in the dimension that is fused.
    config: of the model (object or mapping), or None.

Returns:
    The pattern; its lengths divide `features`.

Raises:
    LayoutError: the config lacks a key, or gives another number of features.
"""


class LayoutError(ValueError):
    """The config lacks a key or does not fit the parameter. `Fused` converts it to MolsConfigError."""


# ---------------------------------------------------------------------------------------------------- config access


def config_value(config: object | None, *keys: str) -> Any:
    """Return the value of the first key in `keys` that is set in the config (object or mapping), else None.

    In a heterogeneous transformers config, a key that differs between layers counts as missing: see `layer_config`.
    """
    for key in keys:
        try:
            value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
        except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
            continue
        if value is not None:
            return value
    return None


_TEXT = ("text_config", "thinker_config", "llm_config", "language_config", "vlm_config")


def text_config(config: object | None) -> object | None:
    """Return the language model's part of a multi-modal config, else the config itself."""
    inner = config_value(config, *_TEXT)
    return config if inner is None else text_config(inner)


def tower_config(config: object | None, tower: str | None) -> object | None:
    """Return the config of a tower, such as `vision_config`. The language model's config for None, or where the tower
    has none."""
    found = config
    while tower is not None and found is not None:
        own = config_value(found, f"{tower}_config")
        if own is not None:
            return own  # type: ignore[no-any-return]
        found = config_value(found, *_TEXT)
    return text_config(config)


def layer_config(config: object | None, layer: int | None) -> object | None:
    """Return the config of one layer: heterogeneous transformers models have one per layer."""
    if layer is None or not config_value(config, "is_heterogeneous"):
        return config
    layers = config_value(config, "per_layer_config")
    return layers[layer] if layers is not None and layer < len(layers) else config


def need(name: str, config: object | None, *keys: str) -> int:
    """Return an integer of the model's config.

    Args:
        name: the parameter that needs it, for the message.
        config: object or mapping, or None.
        keys: names of the value, in order of preference.

    Raises:
        LayoutError: no key is set, or the value is not a whole number of at least 1.
    """
    value = config_value(config, *keys)
    if value is None:
        state = "no model config was given" if config is None else f"the model's config has no {' / '.join(keys)}"
        raise LayoutError(
            f"parameter {name!r} is a fused projection whose layout needs {keys[0]!r}, but {state}; "
            "give the model's config or add a rule for this parameter"
        )
    number = whole(value, *keys)
    if number < 1:
        raise LayoutError(
            f"parameter {name!r} is a fused projection, but the model's config has {keys[0]}={value!r}; "
            "correct it or add a rule for this parameter"
        )
    return number


def whole(value: Any, *keys: str) -> int:
    """Return the value of a config key as an integer. Raises LayoutError with the key where it is not one."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise LayoutError(
            f"the model's config has {' / '.join(keys)}={value!r}, which is not a whole number; correct it"
        ) from None


def _checked(name: str, features: int, expected: int, pattern: Pattern) -> Pattern:
    if features != expected:
        raise LayoutError(
            f"parameter {name!r} has {features} output features, but the model's config gives {expected}; "
            "give the config of this model or add a rule for this parameter"
        )
    return pattern


def _heads(name: str, config: object | None) -> tuple[int, int]:
    """Return (number of attention heads, features per head)."""
    heads = need(name, config, *HEADS)
    explicit = config_value(config, "head_dim")
    return heads, whole(explicit, "head_dim") if explicit else need(name, config, "hidden_size", "n_embd") // heads


# ------------------------------------------------------------------------------------------------- fused projections


def _equal(name: str, features: int, parts: int) -> int:
    if features % parts:
        raise LayoutError(
            f"parameter {name!r} has {features} output features, which {parts} does not divide; add a rule for it"
        )
    return features // parts


def thirds(name: str, features: int, config: object | None) -> Pattern:
    """[q | k | v] one after the other, equal sizes: GPT-2's c_attn, ViT's qkv, torch's MultiheadAttention."""
    size = _equal(name, features, 3)
    return (2 * size, "qk"), (size, "vo")


def halves(name: str, features: int, config: object | None) -> Pattern:
    """[k | v] one after the other: cross attention, JetMoe."""
    size = _equal(name, features, 2)
    return (size, "qk"), (size, "vo")


def per_head(name: str, features: int, config: object | None) -> Pattern:
    """[q | k | v] head by head: GPT-NeoX, BLOOM, the first Falcon, MiniMax's lightning attention, DeBERTa."""
    heads, size = _heads(name, config)
    return _checked(name, features, 3 * heads * size, ((2 * size, "qk"), (size, "vo")))


HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
KV_HEADS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_kv_head", "n_query_groups")
"""Keys of grouped queries: transformers', Llama's own, ModernBERT-like, nanoGPT-like, litgpt's."""


def _kv_heads(config: object | None) -> int | None:
    """Return the number of key and value heads; None without grouped queries in the config."""
    found = config_value(config_value(config, "attn_config"), "kv_n_heads")  # DBRX
    found = config_value(config, *KV_HEADS) if found is None else found
    return None if found is None else whole(found, "num_key_value_heads")


def grouped(name: str, features: int, config: object | None) -> Pattern:
    """[all q | all k | all v] with grouped queries: Phi-3, DBRX, EXAONE's vision tower."""
    heads, size = _heads(name, config)
    kv_heads = _kv_heads(config) or heads
    pattern = (((heads + kv_heads) * size, "qk"), (kv_heads * size, "vo"))
    return _checked(name, features, (heads + 2 * kv_heads) * size, pattern)


def need_kv_heads(name: str, shape: tuple[int, ...], features: int, config: object | None) -> None:
    """Raise LayoutError where the config does not tell how many of a weight's output features are queries."""
    if _kv_heads(config) is not None or config_value(config, "multi_query") is not None:
        return
    if config_value(config, *HEADS) is None or features != 3 * math.prod(_heads(name, config)):
        raise LayoutError(
            f"parameter {name!r} of shape {list(shape)} is not queries, keys and values of equal size, and the model's "
            f"config has no {' / '.join(KV_HEADS)}; give the model's config or add a rule for this parameter"
        )


def qkv(name: str, features: int, config: object | None) -> Pattern:
    """`qkv`, `Wqkv`: [q | k | v], with grouped queries where the config has them."""
    kv_heads, heads = _kv_heads(config), config_value(config, *HEADS)
    if kv_heads is None or heads is None or kv_heads == whole(heads, "num_attention_heads"):
        return thirds(name, features, config)
    heads, size = _heads(name, config)
    # GPT-2 has no grouped queries, also if its config has another number
    return (thirds if features == 3 * heads * size else grouped)(name, features, config)


def c_attn(name: str, features: int, config: object | None) -> Pattern:
    """GPT-2 and nanoGPT: thirds. GPT-BigCode: one key and one value head, or head by head."""
    if config_value(config, "model_type") != "gpt_bigcode":
        return qkv(name, features, config)
    if not config_value(config, "multi_query"):
        return per_head(name, features, config)
    heads, size = _heads(name, config)
    return _checked(name, features, (heads + 2) * size, (((heads + 1) * size, "qk"), (size, "vo")))


def falcon(name: str, features: int, config: object | None) -> Pattern:
    """Falcon: per key-value group [q.. | k | v] (new architecture), all q then k, v (multi-query), or per head."""
    heads, size = _heads(name, config)
    if config_value(config, "new_decoder_architecture"):
        kv_heads = need(name, config, "num_kv_heads")
        queries = heads // kv_heads
        pattern = (((queries + 1) * size, "qk"), (size, "vo"))
        return _checked(name, features, kv_heads * (queries + 2) * size, pattern)
    if config_value(config, "multi_query"):
        return _checked(name, features, (heads + 2) * size, (((heads + 1) * size, "qk"), (size, "vo")))
    return per_head(name, features, config)


def torchtitan(name: str, features: int, config: object | None) -> Pattern:
    """torchtitan's wqkv: per key-value head [q.. | k | v]. Its config has the heads under `first_attention`."""
    attention = config_value(config, "first_attention")
    heads = need(name, attention, *HEADS)
    kv_heads = _kv_heads(attention) or heads
    size = _equal(name, features, heads + 2 * kv_heads)
    return ((heads // kv_heads + 1) * size, "qk"), (size, "vo")


def codegen(name: str, features: int, config: object | None) -> Pattern:
    """CodeGen: four blocks (one per TPU core in its training), each [q | v | k]."""
    size = _equal(name, features, 12)
    return (size, "qk"), (size, "vo"), (size, "qk")


def query_gate(name: str, features: int, config: object | None) -> Pattern:
    """Qwen3-Next and 3.5, `q_proj`: head by head [query | output gate]."""
    heads, size = _heads(name, config)
    return _checked(name, features, 2 * heads * size, ((size, "qk"), (size, "vo")))


def mla_query_gate(name: str, features: int, config: object | None) -> Pattern:
    """A.X K2, `q_gate_proj`: head by head [query without and with rotary part | output gate of the values' size]."""
    heads = need(name, config, "num_attention_heads")
    query = need(name, config, "qk_nope_head_dim") + need(name, config, "qk_rope_head_dim")
    gate = need(name, config, "v_head_dim")
    return _checked(name, features, heads * (query + gate), ((query, "qk"), (gate, "vo")))


def delta_net_qkvz(name: str, features: int, config: object | None) -> Pattern:
    """Qwen3-Next's GatedDeltaNet, `in_proj_qkvz`: per key head [q | k | its values | their gates z]."""
    heads, key, values = _delta_net(name, config)
    value = values // heads
    pattern = ((2 * key, "qk"), (2 * value, "vo"))
    return _checked(name, features, heads * (2 * key + 2 * value), pattern)


def delta_net_qkv(name: str, features: int, config: object | None) -> Pattern:
    """Qwen3.5's GatedDeltaNet, `in_proj_qkv`: [all q | all k | all v]."""
    heads, key, values = _delta_net(name, config)
    return _checked(name, features, 2 * heads * key + values, ((2 * heads * key, "qk"), (values, "vo")))


def _delta_net(name: str, config: object | None) -> tuple[int, int, int]:
    """Return (key heads, features per key head, features of all values)."""
    heads, key = need(name, config, "linear_num_key_heads"), need(name, config, "linear_key_head_dim")
    return heads, key, need(name, config, "linear_num_value_heads") * need(name, config, "linear_value_head_dim")


def mla_kv_a(name: str, features: int, config: object | None) -> Pattern:
    """DeepSeek MLA, down projection: the latent (keys and values) is `vo`, the rotary part of the key is `qk`."""
    rank = need(name, config, "kv_lora_rank")
    if features == rank:  # a layer without rotary positions
        return ((rank, "vo"),)
    rope = need(name, config, "qk_rope_head_dim")
    return _checked(name, features, rank + rope, ((rank, "vo"), (rope, "qk")))


def mla_kv_b(name: str, features: int, config: object | None) -> Pattern:
    """DeepSeek MLA, up projection: head by head [key without rotary part | value]."""
    heads = need(name, config, "num_attention_heads")
    key, value = need(name, config, "qk_nope_head_dim"), need(name, config, "v_head_dim")
    rope = config_value(config, "qk_rope_head_dim") or 0
    if features == heads * (key + rope + value):  # a layer without rotary positions; its keys have the same size
        key += rope
    return _checked(name, features, heads * (key + value), ((key, "qk"), (value, "vo")))


def by_family(families: Mapping[str, PatternOf]) -> PatternOf:
    """Return a pattern that depends on the config's model_type. Raises LayoutError for an unknown model_type."""

    def pattern(name: str, features: int, config: object | None) -> Pattern:
        family = families.get(str(config_value(config, "model_type")))
        if family is None:
            state = (
                "no model config was given"
                if config is None
                else "the config's model_type is " + repr(config_value(config, "model_type"))
            )
            raise LayoutError(
                f"parameter {name!r} is a fused projection whose order is known for model_type {', '.join(families)} "
                f"only, but {state}; give the model's config or add a rule for this parameter"
            )
        return family(name, features, config)

    return pattern
