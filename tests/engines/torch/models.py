"""A small model that a forward pass leaves traces in, and its data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, TOKENS = 12, 31


class Tiny(nn.Module):
    """Embedding, projections, dropout, BatchNorm, head."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(TOKENS, WIDTH)
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up_proj = nn.Linear(WIDTH, WIDTH, bias=False)  # a bias before BatchNorm has noise for a gradient
        self.batch_norm = nn.BatchNorm1d(WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.lm_head = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        x = x + torch.tanh(self.q_proj(x)) * self.v_proj(x)
        x = x + self.dropout(self.batch_norm(self.up_proj(x).flatten(0, 1)).view_as(x))
        logits = self.lm_head(self.norm(x))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def tokens(iteration: int, rank: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * iteration + rank)
    return (torch.rand(4, 9, generator=generator) ** 3 * TOKENS).long()
