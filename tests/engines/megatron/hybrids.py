"""Hybrid stacks of megatron-core 0.19 on the CPU: built with real modules, never run, since their kernels need a GPU.

The shipped specs want Transformer Engine; here each layer has the linear layers and norms of the vanilla spec.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.engines.megatron.tag_models import make_config

MAMBA = {"mamba_state_dim": 8, "mamba_head_dim": 4, "mamba_num_groups": 2, "mamba_num_heads": 6}
DELTA_NET = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


class GatedNorm(nn.Module):
    """In the place of mamba_ssm's norm, whose kernel is triton: one weight an element."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Duplicated(nn.Linear):
    """In the place of Transformer Engine's linear layer that each tensor-parallel rank holds whole."""

    parallel_mode = None

    def __init__(self, inputs: int, outputs: int, *, bias: bool, **options: Any) -> None:
        super().__init__(inputs, outputs, bias=bias)


def make_hybrid(pattern: str, vocabulary: int = 32, tied: bool = False, device: str = "meta", **settings: Any) -> Any:
    """A HybridModel. `pattern`: one letter a layer, as Megatron has it: M Mamba, G gated delta net, * attention,
    D sparse attention, + latent attention, - MLP, E experts."""
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.ssm import mamba_mixer
    from megatron.core.ssm.gated_delta_net import common
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    mamba_mixer.HAVE_MAMBA_SSM = common.HAVE_FLA = True
    mamba_mixer.ExtendedRMSNorm, hybrid_block.TENorm = GatedNorm, WrappedTorchNorm
    config = make_config(
        **{"perform_initialization": False, "deterministic_mode": True, "num_layers": len(pattern), **settings}
    )
    with torch.device(device):
        return HybridModel(
            config,
            _spec(config),
            vocab_size=vocabulary,
            max_sequence_length=16,
            hybrid_layer_pattern=pattern,
            share_embeddings_and_output_weights=tied,
            position_embedding_type="none",
        )


def _spec(config: Any) -> Any:
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_dsa_module_spec_for_backend
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    backend = LocalSpecProvider()
    norm = backend.layer_norm(rms_norm=True, for_qk=False)
    linears = {"in_proj": backend.column_parallel_linear(), "out_proj": backend.row_parallel_linear()}

    def attention(spec: Any) -> Any:
        parts = TransformerLayerSubmodules(input_layernorm=norm, self_attention=spec)
        return ModuleSpec(module=TransformerLayer, submodules=parts)

    def vanilla(**options: Any) -> Any:
        return get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm, **options).submodules

    def mlp(spec: Any) -> Any:
        parts = TransformerLayerSubmodules(pre_mlp_layernorm=norm, mlp=spec.mlp)
        return ModuleSpec(module=MLPLayer, submodules=parts)

    mixer = ModuleSpec(module=MambaMixer, submodules=MambaMixerSubmodules(**linears))
    delta_net = ModuleSpec(module=GatedDeltaNet, submodules=GatedDeltaNetSubmodules(out_norm=norm, **linears))
    layers = {
        "mamba_layer": ModuleSpec(module=MambaLayer, submodules=MambaLayerSubmodules(norm=norm, mixer=mixer)),
        "gdn_layer": attention(delta_net),
        "attention_layer": attention(vanilla().self_attention),
        "mlp_layer": mlp(vanilla()),
    }
    if config.num_moe_experts:
        layers["moe_layer"] = mlp(vanilla(num_experts=config.num_moe_experts))
    if config.multi_latent_attention:
        layers["mla_layer"] = attention(vanilla(multi_latent_attention=True).self_attention)
        backend.linear = backend.column_parallel_linear  # type: ignore[attr-defined]
        sparse = get_dsa_module_spec_for_backend(config, backend)
        indexer = sparse.submodules.core_attention.submodules.indexer.submodules
        indexer.linear_wq_b = indexer.linear_wk = indexer.linear_weights_proj = Duplicated
        layers["dsa_layer"] = attention(sparse)
    return ModuleSpec(module=HybridStack, submodules=HybridStackSubmodules(**layers))
