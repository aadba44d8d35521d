"""One config as a model of transformers and as one of Megatron-core, for every family that both can express."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_patches.collective_checks import merge_shapes
from megatron_patches.cpu.emulation import cpu_megatron
from megatron_patches.param_map import LogicalModel, configs_of, current_grid, local_layout, local_parameters
from mols_ds.core.groups import group_table
from mols_ds.core.rank_checks import together
from tests.engines.megatron.hybrids import DELTA_NET, MAMBA, make_hybrid
from tests.engines.megatron.tag_models import make_gpt


@dataclass(frozen=True)
class Family:
    """`ours`: what differs from OURS in the config of transformers, `theirs` from THEIRS in the TransformerConfig.

    pattern: the layers of Megatron's hybrid stack, which the newest release has; "": a GPTModel.
    dealt: experts are dealt over the ranks, not cut; Megatron does not cut experts with biases.
    """

    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    pattern: str = ""
    dealt: bool = False


OURS: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
THEIRS: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 6,
    "ffn_hidden_size": 40,
}
NEOX = {"normalization": "LayerNorm", "add_bias_linear": True, "gated_linear_unit": False, "position": "rope"}
MANY = {"num_key_value_heads": 4}, {"num_query_groups": 4}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16}
LATENT = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
THEIR_LATENT = {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "kv_lora_rank": 10,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 5,
    "rope_type": "rope",
    "num_query_groups": 4,
}
DEEPSEEK = {
    **LATENT,
    **MANY[0],
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
THEIR_DEEPSEEK = {
    **THEIR_LATENT,
    **EXPERTS,
    "moe_shared_expert_intermediate_size": 16,
    "moe_layer_freq": [0, 1],
}
SPARSE = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
THEIR_SPARSE = {"dsa_indexer_n_heads": 2, "dsa_indexer_head_dim": 8, "dsa_indexer_topk": 4}

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "phi3": Family(),
    "gemma": Family({"head_dim": 10, "tie_word_embeddings": True}, {"kv_channels": 10, "tied": True}),
    "starcoder2": Family({"use_bias": True}, NEOX),
    "gpt2": Family(
        {"n_inner": 40, "tie_word_embeddings": True}, {**NEOX, **MANY[1], "tied": True, "position": "learned_absolute"}
    ),
    "gpt_neox": Family({}, {**NEOX, **MANY[1]}),
    "gpt_bigcode": Family(
        {"n_inner": 40, "tie_word_embeddings": True},
        {**NEOX, "num_query_groups": 1, "tied": True, "position": "learned_absolute"},
    ),
    "nemotron": Family({}, {"normalization": "LayerNorm", "gated_linear_unit": False}),
    "seed_oss": Family({"attention_bias": True}, {"add_qkv_bias": True}),
    "qwen2": Family({}, {"add_qkv_bias": True}),
    "qwen3": Family({}, {"qk_layernorm": True}),
    "mixtral": Family({"num_local_experts": 4}, {**EXPERTS, "moe_ffn_hidden_size": 40}),
    "qwen3_moe": Family({"num_experts": 4, "moe_intermediate_size": 16}, {**EXPERTS, "qk_layernorm": True}),
    "qwen2_moe": Family(
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20},
        {
            **EXPERTS,
            "add_qkv_bias": True,
            "moe_shared_expert_intermediate_size": 20,
            "moe_shared_expert_gate": True,
        },
    ),
    "glm4_moe": Family(
        {
            "n_routed_experts": 4,
            "moe_intermediate_size": 16,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "use_qk_norm": True,
        },
        {
            **EXPERTS,
            "add_qkv_bias": True,
            "qk_layernorm": True,
            "moe_shared_expert_intermediate_size": 16,
            "moe_layer_freq": [0, 1],
        },
    ),
    "deepseek_v2": Family({**DEEPSEEK, "q_lora_rank": None}, {**THEIR_DEEPSEEK, "q_lora_rank": None}),
    "deepseek_v3": Family({**DEEPSEEK, "q_lora_rank": 8}, {**THEIR_DEEPSEEK, "q_lora_rank": 8}),
    "gpt_oss": Family(
        {"num_local_experts": 4},
        {
            **EXPERTS,
            "moe_ffn_hidden_size": 40,
            "add_bias_linear": True,
            "softmax_type": "learnable",
            "position": "rope",
        },
        dealt=True,
    ),
    "deepseek_v32": Family(
        {**DEEPSEEK, **SPARSE, "q_lora_rank": 8},
        {**THEIR_LATENT, **EXPERTS, **THEIR_SPARSE, "q_lora_rank": 8, "moe_shared_expert_intermediate_size": 16},
        "D-DE",
    ),
    "qwen3_next": Family(
        {
            **DELTA_NET,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 20,
        },
        {
            **DELTA_NET,
            **EXPERTS,
            "qk_layernorm": True,
            "attention_output_gate": True,
            "moe_shared_expert_intermediate_size": 20,
            "moe_shared_expert_gate": True,
        },
        "GE*E",
    ),
    "qwen3_5_text": Family(
        {**DELTA_NET, "layer_types": ["linear_attention", "full_attention"]},
        {**DELTA_NET, "qk_layernorm": True, "attention_output_gate": True},
        "G-*-",
    ),
    "glm_moe_dsa": Family(
        {
            **DEEPSEEK,
            **SPARSE,
            "q_lora_rank": 8,
            "mlp_layer_types": ["dense", "sparse"],
            "indexer_types": ["full", "full"],
        },
        {**THEIR_LATENT, **EXPERTS, **THEIR_SPARSE, "q_lora_rank": 8, "moe_shared_expert_intermediate_size": 16},
        "D-DE",
    ),
    "mamba2": Family(
        {"state_size": 8, "head_dim": 4, "n_groups": 2, "num_heads": 12, "expand": 2, "conv_kernel": 4},
        {**MAMBA, "mamba_num_heads": 12},
        "MM",
    ),
    "nemotron_h": Family(
        {
            "layers_block_type": ["mamba", "attention", "mlp", "moe"],
            "num_hidden_layers": 4,
            "ssm_state_size": 8,
            "mamba_head_dim": 4,
            "n_groups": 2,
            "mamba_num_heads": 6,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 20,
        },
        {**MAMBA, **EXPERTS, "moe_shared_expert_intermediate_size": 20, "gated_linear_unit": False},
        "M*-E",
    ),
}


def of_transformers(name: str) -> dict[str, int]:
    """Elements of each group of the model that transformers builds."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **{**OURS, **FAMILIES[name].ours})
    with torch.device("meta"):
        return group_table(AutoModelForCausalLM.from_config(config)).elements


def megatron_model(name: str, ranks: int = 1) -> nn.Module:
    """The model that Megatron-core builds, or this rank's part of it; on the meta device."""
    family = FAMILIES[name]
    settings = {**THEIRS, **family.theirs}
    if ranks > 1:  # without initialization Megatron marks no weight as cut
        settings |= {"tensor_model_parallel_size": ranks, "perform_initialization": True}
        settings["sequence_parallel"] = "num_moe_experts" in settings
        if family.dealt:
            settings |= {"expert_model_parallel_size": ranks, "expert_tensor_parallel_size": 1}
    if family.pattern:
        del settings["num_layers"]
        return make_hybrid(family.pattern, **settings)
    return make_gpt(device="meta", **settings)


def counted_here(name: str) -> dict[str, Any]:
    """On a tensor-parallel rank of the launch: the groups of the logical model, and what this rank counts of each."""
    with cpu_megatron():
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        parallel_state.destroy_model_parallel()
        ranks = dist.get_world_size()
        experts = {"expert_model_parallel_size": ranks, "expert_tensor_parallel_size": 1}
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=ranks, **(experts if FAMILIES[name].dealt else {})
        )
        model_parallel_cuda_manual_seed(1)
        chunks = [megatron_model(name, ranks)]
        found = local_parameters(chunks, current_grid())
        gathered = together(lambda: {local.name: local.shape for local in found if local.names_it})
        table = LogicalModel(merge_shapes(gathered), configs_of(chunks)).table(None, (), "type")
        mine: Counter[str] = Counter()
        for local in found:
            if local.counted:
                mine.update(local_layout(local, table.layouts).counts(local.range.start, local.range.numel))
        parallel_state.destroy_model_parallel()
    return {"logical": table.elements, "mine": dict(mine)}
