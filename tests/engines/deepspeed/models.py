"""Models for the tests on DeepSpeed, beside those of tests/helpers/oracle/models.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.oracle.models import build


class PlainLM(nn.Module):
    """No transformers model, no config: groups come from names alone. Odd sizes: two ranks need padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(97, 19)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(19, 19, bias=False) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(19, 33), nn.Linear(33, 19)
        self.norm = nn.LayerNorm(19)
        self.lm_head = nn.Linear(19, 97, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = self.embed_tokens(input_ids)
        h = torch.nn.functional.scaled_dot_product_attention(
            self.q_proj(x)[:, None], self.k_proj(x)[:, None], self.v_proj(x)[:, None], is_causal=True
        )
        x = x + self.o_proj(h[:, 0])
        x = self.norm(x + self.down_proj(torch.relu(self.up_proj(x))))
        logits = self.lm_head(x)[:, :-1].reshape(-1, 97)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:].reshape(-1))
        return type("Output", (), {"loss": loss})


def model_of(name: str = "llama", *, dropout: float = 0.0, seed: int = 0, scale: int = 1) -> nn.Module:
    """One of the tiny models, or "plain"; `dropout` turns GPT-2's dropout layers on, `scale` as in `build`."""
    if name == "plain":
        torch.manual_seed(seed)
        return PlainLM()
    model = build(name, seed=seed, scale=scale)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


TOKENS, WIDTH, INNER = 31, 12, 19  # of Tiny; odd sizes: shards straddle tensors, and are padded


class Tiny(nn.Module):
    """Two layers with parameters of every module group, named as in LLaMA."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList([nn.ModuleDict(_layer()) for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean next-token cross entropy of tokens (batch, length)."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            mixed = torch.tanh(layer["q_proj"](x)) * layer["k_proj"](x) + layer["v_proj"](x)
            x = x + self.dropout(layer["down_proj"](torch.tanh(layer["up_proj"](mixed))))
        logits = self.lm_head(self.norm(x))
        return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())


def _layer() -> dict[str, nn.Module]:
    square = {name: nn.Linear(WIDTH, WIDTH, bias=False) for name in ("q_proj", "k_proj", "v_proj")}
    up, down = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)
    return {**square, "up_proj": up, "down_proj": down}
