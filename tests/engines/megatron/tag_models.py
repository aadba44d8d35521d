"""Small and meta-device Megatron-core models in one process, for the tests of the tags."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_patches.cpu.emulation import cpu_megatron
from megatron_patches.group_rules import tag_layouts
from mols_ds.core.layout import ElementLayout

Shapes = dict[str, tuple[int, ...]]
MEGATRON = tuple(int(part) for part in version("megatron-core").split(".")[:2])
SMALL: dict[str, Any] = {"num_layers": 1, "hidden_size": 24, "num_attention_heads": 4, "ffn_hidden_size": 40}
MLA: dict[str, Any] = {
    "multi_latent_attention": True,
    "kv_lora_rank": 10,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 5,
    "q_lora_rank": None,
    "rope_type": "rope",
}


@contextmanager
def one_rank() -> Iterator[None]:
    """Megatron-core on the CPU with process groups of one rank."""
    with cpu_megatron():
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def make_config(**settings: Any) -> Any:
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    cls = MLATransformerConfig if settings.get("multi_latent_attention") else TransformerConfig
    defaults = {"use_cpu_initialization": True, "gated_linear_unit": True, "add_bias_linear": False}
    return cls(**{**defaults, "normalization": "RMSNorm", "activation_func": torch.nn.functional.silu, **settings})


def make_gpt(
    vocabulary: int = 32, tied: bool = False, device: str = "cpu", position: str = "", **settings: Any
) -> nn.Module:
    """A GPTModel of the vanilla (local) spec. `position`: as Megatron has it, else learned ones with biases."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec

    config = make_config(**{"perform_initialization": device != "meta", **settings})
    options = {"use_transformer_engine": False}
    spec = get_gpt_decoder_block_spec(config, normalization=config.normalization, **options)
    mtp = get_gpt_mtp_block_spec(config, spec, **options) if settings.get("mtp_num_layers") else None
    with torch.device(device):
        model = GPTModel(
            config,
            spec,
            vocab_size=vocabulary,
            max_sequence_length=16,
            share_embeddings_and_output_weights=tied,
            position_embedding_type=position or ("learned_absolute" if settings.get("add_bias_linear") else "rope"),
            mtp_block_spec=mtp,
        )
    assert isinstance(model, nn.Module)
    return model


def make_t5(**settings: Any) -> nn.Module:
    """A T5Model of the vanilla spec, one layer each, with a separate output layer."""
    from megatron.core.models.T5 import t5_spec
    from megatron.core.models.T5.t5_model import T5Model

    config = make_config(**SMALL, gated_linear_unit=False, **settings)
    model = T5Model(
        config,
        config,
        t5_spec.get_t5_encoder_with_local_block_spec(1),
        t5_spec.get_t5_decoder_with_local_block_spec(1),
        vocab_size=32,
        max_sequence_length=16,
        share_embeddings_and_output_weights=False,
        position_embedding_type="relative",
    )
    assert isinstance(model, nn.Module)
    return model


def make_bert() -> nn.Module:
    """A BertModel of the vanilla spec with one layer and its binary head."""
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    config = make_config(**SMALL, gated_linear_unit=False, add_bias_linear=True)
    model = BertModel(config, 2, bert_layer_local_spec, vocab_size=32, max_sequence_length=16)
    assert isinstance(model, nn.Module)
    return model


def shapes_of(model: nn.Module) -> Shapes:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def row_groups(layout: ElementLayout, shape: tuple[int, ...]) -> list[str]:
    """The group of each row; a row must not be split."""
    inner = shape[1] if len(shape) > 1 else 1
    result: list[str] = []
    for group, offset, length in layout.runs(0, shape[0] * inner):
        assert offset % inner == 0 and length % inner == 0
        result += [group] * (length // inner)
    return result


def rows_by_autograd(
    parameters: Mapping[str, nn.Parameter], outputs: Mapping[str, torch.Tensor]
) -> dict[str, list[str]]:
    """Row -> `vo` where the values or the gate depend on it, else `qk` where queries or keys do, else `none`."""
    result = {}
    for name, parameter in parameters.items():
        touched = {}
        for output, tensor in outputs.items():
            loss = (tensor * torch.randn_like(tensor)).sum()
            (gradient,) = torch.autograd.grad(loss, [parameter], retain_graph=True, allow_unused=True)
            zero = torch.zeros(parameter.shape[0], dtype=torch.bool)
            touched[output] = zero if gradient is None else gradient.reshape(len(zero), -1).abs().sum(1) > 0
        vo = touched["value"] | touched.get("gate", torch.zeros_like(touched["value"]))
        qk = touched["query"] | touched["key"]
        result[name] = ["vo" if v else "qk" if q else "none" for v, q in zip(vo.tolist(), qk.tolist(), strict=True)]
    return result


FUSED: dict[str, dict[str, Any]] = {
    "mha_bias": {"add_bias_linear": True},
    "gqa": {"num_query_groups": 2, "add_qkv_bias": True, "qk_layernorm": True},
    "mqa_wide_heads": {"num_query_groups": 1, "kv_channels": 10},
    "gate": {"num_query_groups": 2, "attention_output_gate": True},
    "mla": MLA,
    "mla_q_lora": {**MLA, "q_lora_rank": 8, "qk_layernorm": True},
}
if MEGATRON < (0, 16):  # has no output gate yet
    del FUSED["gate"]


def attention_rows(case: str, ranks: int) -> list[tuple[str, list[str], list[str]]]:
    """(parameter, row groups by autograd, row groups by its layout) of this rank's rows.

    A bias moves the same rows as its weight, but is `other` here: the paper's groups are weight matrices. Parameters:
    those that make queries, keys and values in the one layer of `FUSED[case]`, sharded over `ranks`
    tensor-parallel ranks, which have to be set up.
    """
    rank = dist.get_rank()
    model = make_gpt(**SMALL, **FUSED[case], tensor_model_parallel_size=ranks)
    prefix = "decoder.layers.0.self_attention."
    attention: Any = model.get_submodule(prefix[:-1])
    parameters = {
        name: parameter for name, parameter in attention.named_parameters() if re.match(r"linear_(?!proj)\w+\.", name)
    }
    hidden = torch.randn(8, 2, SMALL["hidden_size"])
    gate = bool(FUSED[case].get("attention_output_gate"))
    tensors = attention.get_query_key_value_tensors(hidden, **({"output_gate": True} if gate else {}))
    outputs = ("query", "key", "value", "gate") if gate else ("query", "key", "value")  # MLA's latents are behind
    measured = rows_by_autograd(parameters, dict(zip(outputs, tensors, strict=False)))
    logical = {name: (ranks * p.shape[0], *p.shape[1:]) for name, p in attention.named_parameters() if name in measured}
    layouts = tag_layouts({prefix + name: shape for name, shape in logical.items()}, model.config)
    result = []
    for name, rows in measured.items():
        tagged = row_groups(layouts[prefix + name], logical[name])
        rows = ["other"] * len(rows) if name.endswith(".bias") else rows
        result.append((name, rows, tagged[rank * len(rows) : (rank + 1) * len(rows)]))
    return result


def tensor_parallel_rows(case: str) -> list[tuple[str, list[str], list[str]]]:
    """`attention_rows` where each rank of the launch is a tensor-parallel rank."""
    with cpu_megatron():
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
        model_parallel_cuda_manual_seed(1)
        rows = attention_rows(case, dist.get_world_size())
        parallel_state.destroy_model_parallel()
    return rows
