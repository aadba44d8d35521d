"""Three tiny models of transformers, their data, and hand-written masks of their module groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from tests.helpers.oracle.sizes import (
    GROUPS,
    HEADS,
    HIDDEN,
    INNER,
    KEY_HEADS,
    LAYERS,
    MODELS,
    POSITIONS,
    VOCABULARY,
)

SEQUENCES, LENGTH = 2, 16  # of one micro-batch
USED_TOKENS = 80  # ids from here on never occur in the data: embedding rows that never move
COMMON_TOKENS = 60  # ids below follow ZIPF, those up to USED_TOKENS are rare: rows that move once
RARE_SHARE = 0.03
ZIPF = 2.0  # steep: gradients of so few tokens need a strong signal for medians above the noise floor
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None}
INITIAL_STD = 0.1  # larger than usual, so that a tiny model's attention is not flat


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, scale: int = 1) -> nn.Module:
    """One of `MODELS` with reproducible weights; `scale` multiplies the vocabulary (more elements, same shape)."""
    torch.manual_seed(seed)
    common = {
        "vocab_size": VOCABULARY * scale,
        "initializer_range": INITIAL_STD,
        "use_cache": False,
        **NO_SPECIAL_TOKENS,
    }
    rotary = {
        **common,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    model: nn.Module
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**rotary, num_key_value_heads=HEADS))
    elif name == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**rotary, num_key_value_heads=KEY_HEADS))
    elif name == "gpt2":
        config = GPT2Config(
            **common,
            n_embd=HIDDEN,
            n_inner=INNER,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=POSITIONS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        config._attn_implementation = "sink"
        model = GPT2LMHeadModel(config)
    else:
        raise ValueError(f"{name!r} is not one of {MODELS}")
    with torch.no_grad():  # norms and biases away from 1 and 0, where their gradients are special
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += INITIAL_STD * torch.randn_like(parameter)
    model.loss_type = "ForCausalLM"  # which transformers guesses, with a warning, from the name of some classes
    return cast_parameters(model, dtype)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Like `model.to(dtype)`, but buffers keep theirs, as in DeepSpeed: rotary frequencies in bf16 are other angles."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def sink_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object
) -> tuple[Tensor, None]:
    """Causal attention whose softmax has one more, constant logit of 0.

    Without rotary embeddings, softmax does not see a bias of all keys: the exact gradient of GPT-2's key bias is 0 and
    the computed one is float noise, different on each number of ranks, which SNR_i = mu^2/s^2 and Adam would both blow
    up to full size. The sink makes that gradient real, and the model comparable element by element.
    """
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    sink = scores.new_zeros(*scores.shape[:-1], 1)
    weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("sink", sink_attention)
AttentionMaskInterface.register("sink", eager_mask)


def batch(iteration: int, micro: int, rank: int) -> Tensor:
    """Token ids (SEQUENCES, LENGTH), int64: the data of one micro-batch, the same for every model and stage."""
    generator = torch.Generator().manual_seed(10_000 * iteration + 100 * micro + rank)
    shape = (SEQUENCES, LENGTH)
    shares = (1.0 + torch.arange(COMMON_TOKENS)) ** -ZIPF
    common = torch.multinomial(shares, SEQUENCES * LENGTH, replacement=True, generator=generator).view(shape)
    rare = torch.randint(COMMON_TOKENS, USED_TOKENS, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < RARE_SHARE, rare, common)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token cross entropy, as transformers computes it."""
    loss = model(input_ids=tokens, labels=tokens).loss
    assert isinstance(loss, Tensor)
    return loss


def groups_of(model: nn.Module, lr: float, vector_lr: float, decay: float) -> list[dict[str, object]]:
    """Two parameter groups, as usual: matrices with weight decay, vectors without it and with a rate of their own.

    Under zero.Init a parameter's shape is its `ds_shape`.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) < 2]
    return [
        {"params": matrices, "lr": lr, "weight_decay": decay},
        {"params": vectors, "lr": vector_lr, "weight_decay": 0.0},
    ]


def masks(name: str, model: nn.Module) -> dict[str, Tensor]:
    """Index into GROUPS of every element of every trainable parameter, int64, in the parameter's shape."""
    result = {}
    for parameter_name, parameter in model.named_parameters():
        group = _gpt2_group(parameter_name) if name == "gpt2" else _rotary_group(parameter_name)
        mask = torch.full(parameter.shape, GROUPS.index(group))
        if name == "gpt2" and parameter_name.endswith("attn.c_attn.weight"):
            assert parameter.shape == (HIDDEN, 3 * HIDDEN)  # Conv1D: (in, out), so q | k | v are columns
            mask[:, : 2 * HIDDEN] = GROUPS.index("qk")
            mask[:, 2 * HIDDEN :] = GROUPS.index("vo")
        result[parameter_name] = mask
    return result


ROTARY_GROUPS = {
    "embed_tokens": "embedding",
    "lm_head": "head",
    "q_proj": "qk",
    "k_proj": "qk",
    "v_proj": "vo",
    "o_proj": "vo",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
"""Module of models with LLaMA's names -> module group."""


def _rotary_group(name: str) -> str:
    if name.endswith("bias") or "norm" in name:
        return "other"
    return ROTARY_GROUPS[name.split(".")[-2]]


def _gpt2_group(name: str) -> str:
    if name.endswith("bias") or ".ln_" in name:
        return "other"
    if name in ("transformer.wte.weight", "transformer.wpe.weight"):
        return "embedding"
    if name.endswith("attn.c_proj.weight"):
        return "vo"
    if ".mlp." in name:
        return "mlp"
    assert name.endswith("attn.c_attn.weight"), name
    return "qk"
