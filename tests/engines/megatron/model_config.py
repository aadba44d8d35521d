"""Megatron-core's config of the model of a `building.Setup`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.engines.megatron.building import Setup

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def transformer_config(setup: Setup) -> Any:
    """The TransformerConfig or MLATransformerConfig of `setup`."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    dtype = DTYPES[setup.dtype]
    settings: dict[str, Any] = dict(
        num_layers=setup.n_layers,
        hidden_size=setup.hidden,
        num_attention_heads=setup.heads,
        ffn_hidden_size=2 * setup.hidden,
        normalization="LayerNorm" if setup.bias else "RMSNorm",
        add_bias_linear=setup.bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=setup.tp,
        pipeline_model_parallel_size=setup.pp,
        virtual_pipeline_model_parallel_size=setup.vp or None,
        expert_model_parallel_size=setup.ep,
        expert_tensor_parallel_size=setup.etp,
        sequence_parallel=setup.sp,
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        # kernels of CUDA
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    if setup.vp:  # else gradients are silently wrong with two stages; Megatron-LM's arguments forbid it
        settings |= dict(overlap_p2p_comm=True, batch_p2p_comm=False)
    if setup.qk_norm:
        settings |= dict(qk_layernorm=True)
    if setup.gate:  # from 0.16 on
        settings |= dict(attention_output_gate=True)
    if setup.mtp:
        settings |= dict(mtp_num_layers=setup.mtp, mtp_loss_scaling_factor=0.1)
    if setup.recompute == "full":
        settings |= dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif setup.recompute:
        settings |= dict(recompute_granularity="selective", recompute_modules=setup.recompute.split("+"))
    if setup.experts:
        settings |= _moe(setup)
    if setup.mla:
        ranks = dict(q_lora_rank=16 if setup.q_lora else None, kv_lora_rank=16)
        widths = dict(qk_head_dim=8, qk_pos_emb_head_dim=4, v_head_dim=8)
        return MLATransformerConfig(**settings, **ranks, **widths, multi_latent_attention=True, rope_type="rope")
    return TransformerConfig(**settings, num_query_groups=setup.kv_groups)


def _moe(setup: Setup) -> dict[str, Any]:
    balancing = dict(
        moe_router_enable_expert_bias=True,
        moe_router_score_function="sigmoid",
        moe_router_bias_update_rate=1e-2,
        moe_router_load_balancing_type=["aux_loss", "global_aux_loss"],
        moe_aux_loss_coeff=[1e-2, 1e-2],
    )
    # without `balancing` there is no such loss, which would depend on how the micro-batches are dealt
    return (balancing if setup.balancing else {"moe_router_load_balancing_type": "none"}) | dict(
        num_moe_experts=setup.experts,
        moe_ffn_hidden_size=2 * setup.hidden,
        moe_router_topk=2,
        moe_token_dispatcher_type=setup.dispatcher,
        moe_grouped_gemm=setup.grouped,
        moe_shared_expert_intermediate_size=2 * setup.hidden if setup.shared_expert else None,
    )
