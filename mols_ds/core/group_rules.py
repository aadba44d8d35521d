"""Ordered name rules and fused layouts of the model families of transformers 5.x (and plain nanoGPT-like models).

A rule is tried on the canonical name of a parameter (wrapper prefixes and adapters taken off, see `canonical_name`);
the first rule that matches decides. What no rule names is `other` if it is 1-D (norms, biases) and an error if it is
a weight matrix. Biases are `other` also where their weight is `qk` or `vo`: the paper's groups are weight matrices.

Decisions on weights that feed the keys and the values at once: they count as `vo`. That is the latent part of MLA's
`kv_a_proj_with_mqa`, and `lora_A` of a fused QKV projection. Both carry the gradient of the value path, which is the
larger one while attention is still flat.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mols_ds.core.layout import ElementLayout
from mols_ds.errors import MolsConfigError

Pattern = tuple[tuple[int, str], ...]
"""(number of output features, group), in order; repeats over the output features of the parameter."""


class Fused(NamedTuple):
    """The layout of a parameter whose output features belong to several groups.

    pattern: (parameter name, number of output features, model config or None) -> pattern; raises MolsConfigError
    when the config lacks what it needs or the features do not add up.
    long_axis: the output features are the longer of two dimensions (`Conv1D` stores them last, `nn.Linear` first);
    False: they are always dimension 0.
    """

    pattern: Callable[[str, int, object | None], Pattern]
    long_axis: bool = False

    def layout(self, name: str, shape: tuple[int, ...], config: object | None, adapter: bool = False) -> ElementLayout:
        """The layout of parameter `name`; with `adapter` (lora_B, DoRA magnitude) dimension 0 is the output."""
        if not shape:
            raise MolsConfigError(f"parameter {name!r} is a scalar, but its name says a fused projection; add a rule")
        axis = 1 if self.long_axis and not adapter and len(shape) == 2 and shape[1] > shape[0] else 0
        pattern = self.pattern(name, shape[axis], config)
        inner = math.prod(shape[axis + 1 :])
        lengths = [length for length, _ in pattern]
        if inner == 0 or min(lengths) < 1 or shape[axis] % sum(lengths):
            raise MolsConfigError(
                f"parameter {name!r} of shape {list(shape)} does not divide into {pattern}; add a rule"
            )
        return ElementLayout(inner, pattern)


class Rule(NamedTuple):
    """`regex` is searched in the canonical name; `applies` (shape, config) can refuse a match, None accepts each."""

    regex: re.Pattern[str]
    target: str | Fused
    applies: Callable[[tuple[int, ...], object | None], bool] | None = None


# ---------------------------------------------------------------------------------------------------- config access


def config_value(config: object | None, *keys: str) -> Any:
    """The first of `keys` that the config (object or mapping) has and that is not None, else None."""
    for key in keys:
        value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
        if value is not None:
            return value
    return None


def text_config(config: object | None) -> object | None:
    """The language model's part of a multi-modal config, else the config itself."""
    inner = config_value(config, "text_config")
    return config if inner is None else inner


def _need(name: str, config: object | None, *keys: str) -> int:
    """An integer of the model's config; MolsConfigError naming the parameter and the key when it is not there."""
    value = config_value(config, *keys)
    if value is None:
        state = "no model config was given" if config is None else f"the model's config has no {' / '.join(keys)}"
        raise MolsConfigError(
            f"parameter {name!r} is a fused projection whose layout needs {keys[0]!r}, but {state}; "
            "give the model's config or add a rule for this parameter"
        )
    number = _whole(value, *keys)
    if number < 1:
        raise MolsConfigError(
            f"parameter {name!r} is a fused projection, but the model's config says {keys[0]}={value!r}; "
            "correct it or add a rule for this parameter"
        )
    return number


def _whole(value: Any, *keys: str) -> int:
    """The value of a config key as an integer; MolsConfigError naming the key where it is no number."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise MolsConfigError(
            f"the model's config says {' / '.join(keys)}={value!r}, which is not a whole number; correct it"
        ) from None


def _checked(name: str, features: int, expected: int, pattern: Pattern) -> Pattern:
    if features != expected:
        raise MolsConfigError(
            f"parameter {name!r} has {features} output features where the model's config says {expected}; "
            "give the config of this model or add a rule for this parameter"
        )
    return pattern


def _heads(name: str, config: object | None) -> tuple[int, int]:
    """(number of attention heads, features of one head)."""
    heads = _need(name, config, "num_attention_heads", "n_head")
    explicit = config_value(config, "head_dim")
    return heads, _whole(explicit, "head_dim") if explicit else _need(name, config, "hidden_size", "n_embd") // heads


# ------------------------------------------------------------------------------------------------- fused projections


def _thirds(name: str, features: int, config: object | None) -> Pattern:
    """[q | k | v] one after the other, equal sizes: GPT-2's c_attn, nanoGPT, torch's MultiheadAttention."""
    parts = 2 if "crossattention." in name else 3  # GPT-2's cross attention: [k | v], the query is q_attn
    if features % parts:
        raise MolsConfigError(
            f"parameter {name!r} has {features} output features, which {parts} does not divide; add a rule for it"
        )
    size = features // parts
    return ((parts - 1) * size, "qk"), (size, "vo")


def _per_head(name: str, features: int, config: object | None) -> Pattern:
    """[q | k | v] head by head: GPT-NeoX, BLOOM, the first Falcon."""
    heads, size = _heads(name, config)
    return _checked(name, features, 3 * heads * size, ((2 * size, "qk"), (size, "vo")))


def _c_attn(name: str, features: int, config: object | None) -> Pattern:
    if config_value(config, "model_type") != "gpt_bigcode":
        return _thirds(name, features, config)
    if not config_value(config, "multi_query"):
        return _per_head(name, features, config)
    heads, size = _heads(name, config)
    return _checked(name, features, (heads + 2) * size, (((heads + 1) * size, "qk"), (size, "vo")))


def _falcon(name: str, features: int, config: object | None) -> Pattern:
    """Falcon: per key-value group [q.. | k | v] (new architecture), all q then k, v (multi-query), or per head."""
    heads, size = _heads(name, config)
    if config_value(config, "new_decoder_architecture"):
        kv_heads = _need(name, config, "num_kv_heads")
        queries = heads // kv_heads
        pattern = (((queries + 1) * size, "qk"), (size, "vo"))
        return _checked(name, features, kv_heads * (queries + 2) * size, pattern)
    if config_value(config, "multi_query"):
        return _checked(name, features, (heads + 2) * size, (((heads + 1) * size, "qk"), (size, "vo")))
    return _per_head(name, features, config)


def _phi3(name: str, features: int, config: object | None) -> Pattern:
    """[all q | all k | all v] with grouped queries."""
    heads, size = _heads(name, config)
    kv_heads = _whole(config_value(config, "num_key_value_heads") or heads, "num_key_value_heads")
    pattern = (((heads + kv_heads) * size, "qk"), (kv_heads * size, "vo"))
    return _checked(name, features, (heads + 2 * kv_heads) * size, pattern)


def _by_family(families: Mapping[str, Callable[[str, int, object | None], Pattern]]) -> Fused:
    """A name that stands for different orders in different families: the config's model_type must be a known one."""

    def pattern(name: str, features: int, config: object | None) -> Pattern:
        family = families.get(str(config_value(config, "model_type")))
        if family is None:
            state = (
                "no model config was given"
                if config is None
                else "the config's model_type is " + repr(config_value(config, "model_type"))
            )
            raise MolsConfigError(
                f"parameter {name!r} is a fused projection whose order is known for model_type {', '.join(families)} "
                f"only, but {state}; give the model's config or add a rule for this parameter"
            )
        return family(name, features, config)

    return Fused(pattern)


def _mla_kv_a(name: str, features: int, config: object | None) -> Pattern:
    """DeepSeek MLA, down projection: the latent (keys and values) is `vo`, the rotary part of the key is `qk`."""
    rank, rope = _need(name, config, "kv_lora_rank"), _need(name, config, "qk_rope_head_dim")
    return _checked(name, features, rank + rope, ((rank, "vo"), (rope, "qk")))


def _mla_kv_b(name: str, features: int, config: object | None) -> Pattern:
    """DeepSeek MLA, up projection: head by head [key without rotary part | value]."""
    heads = _need(name, config, "num_attention_heads")
    key, value = _need(name, config, "qk_nope_head_dim"), _need(name, config, "v_head_dim")
    return _checked(name, features, heads * (key + value), ((key, "qk"), (value, "vo")))


def _is_router(shape: tuple[int, ...], config: object | None) -> bool:
    """A weight called `gate` is a router only if it has one row per expert; it may be the gate of a gated MLP."""
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    experts = config_value(config, *keys)
    return experts is not None and len(shape) == 2 and shape[0] == _whole(experts, *keys)


# -------------------------------------------------------------------------------------------------- the ordered rules


def _rule(names: str, target: str | Fused, applies: Callable[..., bool] | None = None) -> Rule:
    """A rule on the last components of the name; the parameter may be called `x` or `x.weight`."""
    return Rule(re.compile(rf"(?:^|\.)(?:{names})(?:\.weight)?$"), target, applies)


_QUERY_KEY_VALUE = {
    "gpt_neox": _per_head,
    "gpt_neox_japanese": _per_head,
    "persimmon": _per_head,
    "bloom": _per_head,
    "falcon": _falcon,
}
_QKV_PROJ = {"phi3": _phi3, "phi4_multimodal": _phi3}

PRESETS: tuple[Rule, ...] = (
    # Biases first: some are 2-D (one row per expert).
    Rule(re.compile(r"(?:^|[._])bias$"), "other"),
    _rule(
        "wte|wpe|embed_tokens|embed_in|embed_positions|word_embeddings|position_embeddings|tok_embeddings|"
        "token_embeddings?|position_embeddings?|tok_emb|pos_emb|token_emb|embeddings?",
        "embedding",
    ),
    _rule("lm_head|embed_out|output_layer", "head"),
    Rule(re.compile(r"^(?:model\.)?(?:output|head)\.weight$"), "head"),
    # Routers.
    _rule("router|router\\.\\w+|shared_expert_gate|wg", "other"),
    _rule("gate", "other", _is_router),
    # Fused projections.
    _rule("c_attn", Fused(_c_attn, long_axis=True)),
    _rule("query_key_value", _by_family(_QUERY_KEY_VALUE)),
    _rule("qkv_proj", _by_family(_QKV_PROJ)),
    _rule("kv_a_proj_with_mqa", Fused(_mla_kv_a)),
    _rule("kv_b_proj", Fused(_mla_kv_b)),
    _rule("in_proj_weight", Fused(_thirds)),
    # Separate projections.
    _rule("q_proj|k_proj|q_a_proj|q_b_proj|q_attn|wq|wk", "qk"),
    _rule("v_proj|o_proj|out_proj|wv|wo", "vo"),
    _rule(r"\w*(?:attn|attention)\.(?:query|key)", "qk"),
    _rule(r"\w*(?:attn|attention)\.(?:value|c_proj|dense|proj)", "vo"),
    # MLPs and experts (3-D `experts.gate_up_proj` and `experts.down_proj` since transformers 5).
    _rule("gate_proj|up_proj|down_proj|gate_up_proj|c_fc|fc1|fc2|fc_in|fc_out|dense_h_to_4h|dense_4h_to_h", "mlp"),
    _rule(r"w1|w2|w3|linear1|linear2|mlp\.c_proj|experts", "mlp"),
)
"""First match wins."""


# ------------------------------------------------------------------------------------------- wrappers and adapters


class CanonicalName(NamedTuple):
    """name: the layer's own parameter name. adapter: None, "rows" (dimension 0 is the layer's output) or "shared"."""

    name: str
    adapter: str | None


_PREFIX = re.compile(r"^(?:(?:module|_orig_mod|base_model\.model)\.)+")
_ADAPTER = re.compile(
    r"^(?P<layer>.+)\.(?P<kind>lora_A|lora_B|lora_E|lora_magnitude_vector|lora_embedding_A|lora_embedding_B|"
    r"trainable_tokens_delta)\.[^.]+(?:\.(?P<leaf>weight|bias))?$"
)
_INNER = re.compile(r"\.(?:base_layer|_orig_mod|token_adapter|original_module|modules_to_save\.[^.]+)(?=\.|$)")


def strip_wrappers(name: str) -> str:
    """The name without the prefixes of DeepSpeed and DDP (`module.`), torch.compile and peft (`base_model.model.`)."""
    return _PREFIX.sub("", name)


def canonical_name(name: str) -> CanonicalName:
    """The name that the rules are tried on: an adapter takes the group of the layer that it adapts (peft's LoRA, DoRA,
    AdaLoRA, trainable tokens, modules_to_save)."""
    stripped = strip_wrappers(name)
    match = _ADAPTER.match(stripped)
    if match is None:
        return CanonicalName(_INNER.sub("", stripped), None)
    kind = "rows" if match["kind"] in ("lora_B", "lora_magnitude_vector") else "shared"
    return CanonicalName(f"{_INNER.sub('', match['layer'])}.{match['leaf'] or 'weight'}", kind)
