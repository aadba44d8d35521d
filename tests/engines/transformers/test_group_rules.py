"""The presets on real transformers classes at their published sizes (meta device), counted by hand from the config."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from mols_ds.core.groups import GROUPS, group_table


class Case(NamedTuple):
    """config: the model. expected: elements per group, counted by hand; `other` is the rest. total: as published."""

    config: Any
    expected: dict[str, int]
    total: int


def dense(  # the LLaMA shape: separate q, k, v, o projections and a gated MLP
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int, size: int, *, tied: bool = False
) -> dict[str, int]:
    expected = {
        "embedding": vocab * hidden,
        "head": vocab * hidden,
        "qk": layers * (heads + kv) * size * hidden,
        "vo": layers * (kv * size * hidden + heads * size * hidden),
        "mlp": layers * 3 * hidden * inner,
    }
    if tied:
        del expected["head"]
    return expected


def sizes(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict[str, int]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }


LLAMA2 = (32000, 4096, 11008, 32, 32, 32)
LLAMA3 = (128256, 4096, 14336, 32, 32, 8)
QWEN2 = (152064, 3584, 18944, 28, 28, 4)
QWEN3 = (151936, 4096, 12288, 36, 32, 8)
MISTRAL = (32000, 4096, 14336, 32, 32, 8)
GEMMA_2B = (256000, 2048, 16384, 18, 8, 1)
GEMMA_7B = (256000, 3072, 24576, 28, 16, 16)
GEMMA2_9B = (256000, 3584, 14336, 42, 16, 8)
GEMMA3_1B = (262144, 1152, 6912, 26, 4, 1)
PHI3 = (32064, 3072, 8192, 32, 32, 32)

DENSE = {
    "llama2-7b": Case(transformers.LlamaConfig(**sizes(*LLAMA2)), dense(*LLAMA2, 128), 6_738_415_616),
    "llama3-8b": Case(transformers.LlamaConfig(**sizes(*LLAMA3)), dense(*LLAMA3, 128), 8_030_261_248),
    "qwen2-7b": Case(transformers.Qwen2Config(**sizes(*QWEN2)), dense(*QWEN2, 128), 7_615_616_512),
    "qwen3-8b": Case(transformers.Qwen3Config(**sizes(*QWEN3), head_dim=128), dense(*QWEN3, 128), 8_190_735_360),
    "mistral-7b": Case(transformers.MistralConfig(**sizes(*MISTRAL)), dense(*MISTRAL, 128), 7_241_732_096),
    "gemma-2b": Case(
        transformers.GemmaConfig(**sizes(*GEMMA_2B), head_dim=256), dense(*GEMMA_2B, 256, tied=True), 2_506_172_416
    ),
    "gemma-7b": Case(
        transformers.GemmaConfig(**sizes(*GEMMA_7B), head_dim=256), dense(*GEMMA_7B, 256, tied=True), 8_537_680_896
    ),
    "gemma2-9b": Case(
        transformers.Gemma2Config(**sizes(*GEMMA2_9B), head_dim=256), dense(*GEMMA2_9B, 256, tied=True), 9_241_705_984
    ),
    "gemma3-1b": Case(
        transformers.Gemma3TextConfig(**sizes(*GEMMA3_1B), head_dim=256), dense(*GEMMA3_1B, 256, tied=True), 999_885_952
    ),
    # One matrix of 2 * inner rows for gate and up: the same count as three separate ones.
    "phi3-mini": Case(transformers.Phi3Config(**sizes(*PHI3)), dense(*PHI3, 96), 3_821_079_552),
}

PLAIN = {  # two-matrix MLPs
    "gpt2-small": Case(
        transformers.GPT2Config(),
        {
            "embedding": (50257 + 1024) * 768,
            "qk": 12 * 2 * 768 * 768,
            "vo": 12 * 2 * 768 * 768,
            "mlp": 12 * 8 * 768 * 768,
        },
        124_439_808,
    ),
    "gpt-neox-20b": Case(
        transformers.GPTNeoXConfig(),
        {
            "embedding": 50432 * 6144,
            "head": 50432 * 6144,
            "qk": 44 * 2 * 6144**2,
            "vo": 44 * 2 * 6144**2,
            "mlp": 44 * 2 * 6144 * 24576,
        },
        20_554_567_680,
    ),
    "phi-2": Case(
        transformers.PhiConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32),
        {
            "embedding": 51200 * 2560,
            "head": 51200 * 2560,
            "qk": 32 * 2 * 2560**2,
            "vo": 32 * 2 * 2560**2,
            "mlp": 32 * 2 * 2560 * 10240,
        },
        2_779_683_840,
    ),
    # 71 query heads of 64, one key and one value head.
    "falcon-7b": Case(
        transformers.FalconConfig(),
        {
            "embedding": 65024 * 4544,
            "qk": 32 * (4544 + 64) * 4544,
            "vo": 32 * (64 + 4544) * 4544,
            "mlp": 32 * 8 * 4544**2,
        },
        6_921_720_704,
    ),
    # 128 query heads of 64, 8 key and 8 value heads.
    "falcon-40b": Case(
        transformers.FalconConfig(
            hidden_size=8192,
            num_hidden_layers=60,
            num_attention_heads=128,
            num_kv_heads=8,
            new_decoder_architecture=True,
        ),
        {
            "embedding": 65024 * 8192,
            "qk": 60 * (8192 + 512) * 8192,
            "vo": 60 * (512 + 8192) * 8192,
            "mlp": 60 * 8 * 8192**2,
        },
        41_303_293_952,
    ),
}


def with_experts(attention: dict[str, int], mlp: int) -> dict[str, int]:
    return attention | {"mlp": mlp}


MIXTRAL = (32000, 4096, 14336, 32, 32, 8)
QWEN15_MOE = (151936, 2048, 5632, 24, 16, 16)
QWEN3_MOE = (151936, 2048, 6144, 48, 32, 4)

EXPERTS = {
    "mixtral-8x7b": Case(
        transformers.MixtralConfig(**sizes(*MIXTRAL)),
        with_experts(dense(*MIXTRAL, 128), 32 * 8 * 3 * 4096 * 14336),
        46_702_792_704,
    ),
    "qwen1.5-moe-a2.7b": Case(
        transformers.Qwen2MoeConfig(**sizes(*QWEN15_MOE)),
        with_experts(dense(*QWEN15_MOE, 128), 24 * 3 * 2048 * (60 * 1408 + 5632)),
        14_315_784_192,
    ),
    "qwen3-30b-a3b": Case(
        transformers.Qwen3MoeConfig(**sizes(*QWEN3_MOE), head_dim=128, moe_intermediate_size=768, num_experts=128),
        with_experts(dense(*QWEN3_MOE, 128), 48 * 3 * 2048 * 128 * 768),
        30_532_122_624,
    ),
    # MLA. Per layer: 16 heads of 128 + 64 query features; latent 512 (keys and values: vo) + 64 rotary (qk);
    # up projection per head 128 key and 128 value rows. Layer 0 is dense, 26 layers of 64 + 2 experts of 1408.
    "deepseek-v2-lite": Case(
        transformers.DeepseekV2Config(
            hidden_size=2048,
            intermediate_size=10944,
            num_hidden_layers=27,
            num_attention_heads=16,
            num_key_value_heads=16,
            q_lora_rank=None,
            first_k_dense_replace=1,
            moe_intermediate_size=1408,
        ),
        {
            "embedding": 102400 * 2048,
            "head": 102400 * 2048,
            "qk": 27 * (16 * 192 * 2048 + 64 * 2048 + 16 * 128 * 512),
            "vo": 27 * (512 * 2048 + 16 * 128 * 512 + 16 * 128 * 2048),
            "mlp": 3 * 2048 * (10944 + 26 * 66 * 1408),
        },
        15_706_484_224,
    ),
    # As above with 128 heads and a latent query of 1536; 3 dense layers, 58 of 256 + 1 experts of 2048. The published
    # 671,026,419,200 also counts the routers' correction biases (58 * 256), which are buffers.
    "deepseek-v3": Case(
        transformers.DeepseekV3Config(),
        {
            "embedding": 129280 * 7168,
            "head": 129280 * 7168,
            "qk": 61 * (1536 * 7168 + 128 * 192 * 1536 + 64 * 7168 + 128 * 128 * 512),
            "vo": 61 * (512 * 7168 + 128 * 128 * 512 + 128 * 128 * 7168),
            "mlp": 3 * 7168 * (3 * 18432 + 58 * 257 * 2048),
        },
        671_026_419_200 - 58 * 256,
    ),
}

CASES = DENSE | PLAIN | EXPERTS


@pytest.mark.parametrize("name", CASES)
def test_a_published_model_splits_as_counted_by_hand(name: str) -> None:
    case = CASES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(case.config)
    table = group_table(model)
    assert sum(parameter.numel() for parameter in model.parameters()) == case.total, "not the published model"
    expected = case.expected | {"other": case.total - sum(case.expected.values())}
    assert table.elements == expected
    assert [row.group for row in table] == [group for group in GROUPS if group in expected]
    assert sum(row.share for row in table) == pytest.approx(1.0, abs=1e-12)
    assert expected["other"] / case.total < 0.01, "the five groups hold about 99 % of the weights"


@pytest.mark.parametrize("name", ["gpt2-small", "qwen2-7b", "gpt-neox-20b", "qwen1.5-moe-a2.7b", "deepseek-v3"])
def test_other_holds_norms_biases_and_routers_only(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CASES[name].config)
    table = group_table(model)
    others = [parameter for parameter, layout in table.layouts.items() if "other" in layout.groups]
    matrices = {
        parameter.rpartition("layers.")[2].partition(".")[2] for parameter in others if len(table.shapes[parameter]) > 1
    }
    assert matrices <= {"mlp.gate.weight", "mlp.shared_expert_gate.weight"}
    assert all(table.layouts[parameter].groups == ("other",) for parameter in others)
