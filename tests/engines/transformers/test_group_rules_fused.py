"""Fused layouts against what the real modules do: attention probabilities depend on `qk` elements, never on `vo` ones.

A wrong interleaving would put a value row among the keys, whose gradient is then exactly zero, or the other way round.
"""

from __future__ import annotations

import re
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mols_ds.core.groups import ElementLayout, group_table
from mols_ds.core.layout import SCALED_GROUPS

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft

SMALL = {"vocab_size": 40, "hidden_size": 24, "num_attention_heads": 6}
LAYER = {"num_hidden_layers": 1, "intermediate_size": 16}

MODELS: dict[str, tuple[Any, str]] = {
    "gpt2": (transformers.GPT2Config(n_embd=24, n_head=6, n_layer=1, vocab_size=40), "c_attn"),
    "gpt_bigcode multi-query": (transformers.GPTBigCodeConfig(n_embd=24, n_head=6, n_layer=1, vocab_size=40), "c_attn"),
    "gpt_bigcode per head": (
        transformers.GPTBigCodeConfig(n_embd=24, n_head=6, n_layer=1, vocab_size=40, multi_query=False),
        "c_attn",
    ),
    "gpt_neox": (transformers.GPTNeoXConfig(**SMALL, **LAYER), "query_key_value"),
    "gpt_neox_japanese": (transformers.GPTNeoXJapaneseConfig(**SMALL, num_hidden_layers=1), "query_key_value"),
    "persimmon": (transformers.PersimmonConfig(**SMALL, **LAYER), "query_key_value"),
    "bloom": (transformers.BloomConfig(vocab_size=40, hidden_size=24, n_head=6, n_layer=1), "query_key_value"),
    "phi3 grouped queries": (
        transformers.Phi3Config(**SMALL, **LAYER, num_key_value_heads=2, pad_token_id=0),
        "qkv_proj",
    ),
    "falcon multi-query": (transformers.FalconConfig(**SMALL, num_hidden_layers=1), "query_key_value"),
    "falcon per head": (
        transformers.FalconConfig(**SMALL, num_hidden_layers=1, multi_query=False, alibi=True),
        "query_key_value",
    ),
    "falcon new architecture": (
        transformers.FalconConfig(**SMALL, num_hidden_layers=1, new_decoder_architecture=True, num_kv_heads=2),
        "query_key_value",
    ),
}
MLA = {
    **SMALL,
    **LAYER,
    "num_key_value_heads": 6,
    "kv_lora_rank": 10,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "first_k_dense_replace": 1,
}


def build(config: Any) -> nn.Module:
    torch.manual_seed(3)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in model.parameters():
        # Large weights: no gradient is small by accident, and none is a power of a small number.
        parameter.data.normal_(std=0.5)
    return model


def attention_gradient(model: nn.Module, weight: nn.Parameter) -> Tensor:
    """Gradient of a random projection of the first layer's attention probabilities with respect to `weight`."""
    tokens = torch.arange(12).reshape(2, 6) * 3 % 39 + 1
    probabilities = model(tokens, output_attentions=True, use_cache=False).attentions[0]
    generator = torch.Generator().manual_seed(5)
    loss = (probabilities * torch.randn(probabilities.shape, generator=generator, dtype=torch.float64)).sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    return gradient


def check(gradient: Tensor, layout: ElementLayout) -> None:
    seen = {"qk": 0, "vo": 0}
    for group, view in layout.views(gradient.reshape(-1), 0):
        seen[group] += view.numel()
        if group == "qk":
            assert (view != 0).all(), "an element called qk does not reach the attention probabilities"
        else:
            assert (view == 0).all(), "an element called vo reaches the attention probabilities"
    assert min(seen.values()) > 0
    assert seen == layout.counts(0, gradient.numel())


@pytest.mark.parametrize("name", MODELS)
def test_fused_projection(name: str) -> None:
    config, layer = MODELS[name]
    model = build(config)
    table = group_table(model)
    (full,) = [key for key in table.layouts if key.endswith(f"{layer}.weight")]
    check(attention_gradient(model, model.get_parameter(full)), table.layouts[full])


@pytest.mark.parametrize("config_class", [transformers.DeepseekV2Config, transformers.DeepseekV3Config])
def test_multi_head_latent_attention(config_class: type) -> None:
    model = build(config_class(**MLA))
    table = group_table(model)
    attention = "model.layers.0.self_attn."
    up, down = model.get_parameter(f"{attention}kv_b_proj.weight"), f"{attention}kv_a_proj_with_mqa.weight"
    check(attention_gradient(model, up), table.layouts[f"{attention}kv_b_proj.weight"])
    for query in ("q_a_proj", "q_b_proj"):
        assert table.layouts[f"{attention}{query}.weight"] == ElementLayout.whole("qk")
        assert (attention_gradient(model, model.get_parameter(f"{attention}{query}.weight")) != 0).all()
    # The latent rows feed keys and values at once (counted as vo): without the latent part of the keys only the
    # rotary rows reach the attention probabilities.
    for group, view in table.layouts[f"{attention}kv_b_proj.weight"].views(up.data.view(-1), 0):
        if group == "qk":
            view.zero_()
    check(attention_gradient(model, model.get_parameter(down)), table.layouts[down])
    assert table.layouts[down].counts(0, 14 * 24) == {"vo": 10 * 24, "qk": 4 * 24}


def test_cross_attention_of_gpt2_has_keys_and_values_only() -> None:
    model = build(transformers.GPT2Config(n_embd=24, n_head=6, n_layer=1, vocab_size=40, add_cross_attention=True))
    table = group_table(model)
    assert table.layouts["transformer.h.0.crossattention.c_attn.weight"] == ElementLayout(1, ((24, "qk"), (24, "vo")))
    assert table.layouts["transformer.h.0.crossattention.q_attn.weight"] == ElementLayout.whole("qk")
    assert table.layouts["transformer.h.0.crossattention.c_proj.weight"] == ElementLayout.whole("vo")


def test_torch_multihead_attention() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16)])})
    layouts = group_table(model).layouts
    assert layouts["layers.0.self_attn.in_proj_weight"] == ElementLayout(8, ((16, "qk"), (8, "vo")))
    assert layouts["layers.0.self_attn.in_proj_bias"] == ElementLayout.whole("other")
    assert layouts["layers.0.self_attn.out_proj.weight"] == ElementLayout.whole("vo")
    assert layouts["layers.0.linear1.weight"] == layouts["layers.0.linear2.weight"] == ElementLayout.whole("mlp")


# ----------------------------------------------------------------------------------------------------------- adapters


def adapted(name: str, **lora: Any) -> tuple[nn.Module, str]:
    config, layer = MODELS[name]
    torch.manual_seed(3)
    model = peft.get_peft_model(build(config), peft.LoraConfig(r=3, target_modules=[layer], **lora))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            # Far from zero, and small enough that no softmax saturates (its gradient would be exactly zero).
            parameter.data = (torch.rand_like(parameter.data) * 0.1 + 0.05).double()
    return model.eval(), layer


@pytest.mark.parametrize("name", ["gpt2", "phi3 grouped queries", "gpt_neox", "falcon new architecture"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_lora_of_a_fused_projection(name: str) -> None:
    model, layer = adapted(name)
    table = group_table(model)
    assert len(table.layouts) == 2, "peft froze the rest"
    (down,) = [key for key in table.layouts if key.endswith(f"{layer}.lora_A.default.weight")]
    (up,) = [key for key in table.layouts if key.endswith(f"{layer}.lora_B.default.weight")]
    assert table.layouts[down] == ElementLayout.whole("vo")
    check(attention_gradient(model, model.get_parameter(up)), table.layouts[up])


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_dora_magnitudes_follow_the_rows() -> None:
    model, _ = adapted("gpt2", use_dora=True)
    layouts = group_table(model).layouts
    (magnitude,) = [key for key in layouts if "lora_magnitude_vector" in key]
    assert layouts[magnitude].counts(0, model.get_parameter(magnitude).numel()) == {"qk": 48, "vo": 24}


def test_adapters_take_the_group_of_the_layer_that_they_adapt() -> None:
    config = transformers.LlamaConfig(**SMALL, **LAYER)
    lora = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "o_proj", "up_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
        use_dora=False,
    )
    model = peft.get_peft_model(build(config), lora)
    layouts = group_table(model, rules=[(r"^model\.layers\.0\.mlp\.up_proj\.weight$", "other_mlp")]).layouts
    expected = {
        r"q_proj\.lora_[AB]": "qk",
        r"o_proj\.lora_[AB]": "vo",
        r"up_proj\.lora_[AB]": "other_mlp",
        r"embed_tokens\.lora_embedding_[AB]": "embedding",
        r"lm_head\.modules_to_save": "head",
    }
    assert len(layouts) == 9
    for name, layout in layouts.items():
        (group,) = [group for pattern, group in expected.items() if re.search(pattern, name)]
        assert layout == ElementLayout.whole(group), name


def test_every_preset_group_is_one_of_the_method() -> None:
    for name, (config, _) in MODELS.items():
        assert set(group_table(build(config)).elements) <= {*SCALED_GROUPS, "other"}, name
