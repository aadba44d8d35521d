"""Hybrid stacks of megatron-core 0.19 on the CPU: real modules. Mamba is built and never run: its kernels need a GPU.

The shipped specs want Transformer Engine; here each layer has the linear layers and norms of the vanilla spec.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_patches.cpu.emulation import cpu_megatron
from megatron_patches.group_rules import tag_layouts, tag_table
from megatron_patches.param_map import configs_of, current_grid, local_parameters
from tests.engines.megatron.tag_models import make_config, row_groups, rows_by_autograd

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
    """Replaces Transformer Engine's linear layer that each tensor-parallel rank has whole."""

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


def groups_of_layers(pattern: str, settings: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Parameter name -> groups, of a hybrid stack on the meta device."""
    with cpu_megatron(), _grid():
        layouts = tag_table(make_hybrid(pattern, **settings)).layouts
    return {name: layout.groups for name, layout in layouts.items()}


def delta_net_rows() -> tuple[list[str], list[str]]:
    """(groups by autograd, groups by the layout) of this tensor-parallel rank's rows of in_proj."""
    with cpu_megatron(), _grid() as ranks:
        settings = {"hidden_size": 24, "num_attention_heads": 4, "ffn_hidden_size": 40, **DELTA_NET}
        more = {"tensor_model_parallel_size": ranks, "perform_initialization": True}
        model = make_hybrid("G", device="cpu", **settings, **more)
        layer, seen = model.decoder.layers[0].self_attention, dict[str, torch.Tensor]()

        def rule(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **rest: Any) -> Any:
            seen.update(query=query, key=key, value=value)
            return value, None

        def norm(core: torch.Tensor, gate: torch.Tensor, *rest: Any) -> torch.Tensor:
            seen["gate"] = gate
            return core.reshape(*core.shape[:2], -1).transpose(0, 1)

        layer.use_qk_l2norm = False  # a kernel; it mixes no rows of two groups
        layer.gated_delta_rule, layer._gated_norm_and_a2a = rule, norm
        layer(torch.randn(8, 2, 24), None)
        measured = rows_by_autograd({"in_proj": layer.in_proj.weight}, seen)["in_proj"]
        (found,) = [p for p in local_parameters([model], current_grid()) if p.name.endswith("in_proj.weight")]
        layout = tag_layouts({found.name: found.shape}, None, modules=configs_of([model]))[found.name]
        rows = row_groups(layout, found.shape)[found.range.start // 24 :][: len(measured)]
    return (["other" if group == "none" else group for group in measured], rows)


@contextmanager
def _grid() -> Iterator[int]:
    """Every rank of the launch is a tensor-parallel rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(1)
    try:
        yield dist.get_world_size()
    finally:
        parallel_state.destroy_model_parallel()


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
