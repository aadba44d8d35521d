"""Parameter names: wrapper prefixes, adapters (peft, Megatron-Bridge), layer numbers, names without numbers."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Adapter = Literal["rows", "shared", "mixed"]
"""Relation of an adapter's parameter to the adapted layer's output features. "rows": dimension 0 is these features
(lora_B, DoRA's magnitude). "shared": feeds all of them (lora_A). "mixed": neither (LoKr's factors)."""


class CanonicalName(NamedTuple):
    """name: parameter name in the adapted layer. adapter: its kind, or None for a parameter of the model itself."""

    name: str
    adapter: Adapter | None


_PREFIX = re.compile(r"^(?:(?:module|_orig_mod|base_model\.model)\.)+")
_WRAPPED = re.compile(r"(?<![^.])_(?:checkpoint|fsdp)_wrapped_module\.")
_KINDS = (  # of peft 0.21: LoRA, DoRA, AdaLoRA, LoHa, LoKr, OFT, BOFT, IA3, VeRA and the others of its tuners
    r"lora_(?:A|B|E|embedding_A|embedding_B|magnitude_vector)|adamss_[AB]|boft_[Rs]|c3a_kernel|deft_[PR]|"
    r"delora_(?:A|B|lambda)|fourierft_spectrum|frod_lambda_(?:l|s_values)|glora_[ABC]|gralora_[AB](?:_general)?|"
    r"hada_(?:w[12]_[ab]|t[12])|hira_(?:embedding_)?[AB]|hra_u|ia3_l|lily_(?:A|B|router)|lokr_(?:w[12](?:_[ab])?|t2)|"
    r"miss_block|oft_(?:embedding_)?R|osf_svd_params|peanut_(?:A|B|encoders|decoders)|poly_(?:lora_[AB]|router)|psoft_R|"
    r"p?vera_lambda_[bd]|randlora_(?:lambda|gamma)|road_(?:theta|alpha)|shadow_(?:down|up|update_transform|update_gate)|"
    r"shira_weight|supertuning_(?:values|lora_[AB])|tinylora_v|trainable_tokens_delta|unilora_theta_d|"
    r"vblora_(?:logits_[AB]|vector_bank)|waveft_spectrum"
)
_ADAPTER = re.compile(rf"^(?P<layer>.+?)\.(?P<kind>{_KINDS})\.[^.]+(?:\.(?:(?P<bias>bias|\d+\.bias)|[\w.]+))?$")
_BRIDGE = re.compile(
    r"^(?P<layer>.+?)\.(?:adapter|adapters\.\d+)\.(?:adapter_(?P<part>\w+)\.)?"
    r"(?P<kind>linear_in|linear_out|weight_magnitude)(?:\.weight)?$"
)
"""LoRA and DoRA of Megatron-Bridge (bridge/peft). Its canonical LoRA has one adapter per part of a fused layer."""
_BIAS_ADAPTER = re.compile(r"^(?P<layer>.+?)\.beft_bias\.[^.]+$")
_INNER = re.compile(
    r"\.(?:base_layer|_orig_mod|token_adapter|original_module|to_wrap|(?:modules_to_save|ln_tuning_layers)\.[^.]+)(?=\.|$)"
)
_ROWS = {"lora_B", "lora_magnitude_vector", "vera_lambda_b", "pvera_lambda_b", "boft_s"}
_SHARED = {"lora_A", "lora_E", "lora_embedding_A", "lora_embedding_B", "vera_lambda_d", "pvera_lambda_d"}
_SHARED |= {"trainable_tokens_delta", "hra_u", "oft_R", "boft_R"}  # the last three rotate the layer's input
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|decoder_layers)\.(\d+)(?=\.|$)")
_ANY_INDEX = re.compile(r"(?:^|\.)(?<!experts\.)(\d+)(?=\.|$)")
_NUMBER = re.compile(r"(?<![^.])(expert_)?\d+(?=\.|$)")


def strip_wrappers(name: str) -> str:
    """Remove the prefixes of DeepSpeed and DDP (`module.`), torch.compile and peft (`base_model.model.`).

    Removes the modules of activation checkpointing and FSDP (version 1) anywhere in the name.
    """
    return _PREFIX.sub("", _WRAPPED.sub("", name))


def canonical_name(name: str) -> CanonicalName:
    """Return the name for the rules: an adapter of peft or Megatron-Bridge gets the name of the adapted parameter."""
    stripped = strip_wrappers(name)
    match = _ADAPTER.match(stripped)
    if match is not None:
        kind = match["kind"]
        adapter: Adapter = "rows" if kind in _ROWS else "shared" if kind in _SHARED else "mixed"
        return CanonicalName(f"{_INNER.sub('', match['layer'])}.{'bias' if match['bias'] else 'weight'}", adapter)
    match = _BRIDGE.match(stripped)
    if match is not None:
        layer = match["layer"]
        if match["part"] in ("q", "k", "v"):
            layer = layer.removesuffix("qkv") + match["part"]
        return CanonicalName(f"{layer}.weight", "shared" if match["kind"] == "linear_in" else "rows")
    match = _BIAS_ADAPTER.match(stripped)
    return CanonicalName(_INNER.sub("", f"{match['layer']}.bias" if match else stripped), None)


def layer_match(name: str) -> re.Match[str] | None:
    """Match the layer number in a parameter's name: group 1 of the match. None outside of layers."""
    return _LAYER.search(name) or _ANY_INDEX.search(name)


def layer_number(name: str) -> int | None:
    """Return the layer number in a canonical name; None outside of layers."""
    match = layer_match(name)
    return None if match is None else int(match[1])


def kind_of(name: str) -> str:
    """Replace each layer and expert number in the name by N. Equal results are one kind of parameter."""
    return _NUMBER.sub(lambda match: f"{match[1] or ''}N", strip_wrappers(name))


def kind_pattern(name: str) -> str:
    """Return a regular expression that matches every name of this kind."""
    pattern = re.escape(kind_of(name)).replace(r"\.", ".")
    pattern = re.sub(r"(?<![^.])(expert_)?N(?=\.|$)", lambda match: f"{match[1] or ''}#", pattern)
    return "^" + pattern.replace(".", r"\.").replace("#", r"\d+") + "$"
