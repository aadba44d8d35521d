"""A small model that a forward pass leaves traces in, its data, its optimizer and the section of one-process tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from tests.helpers.oracle.sizes import GROUPS

WIDTH, TOKENS = 12, 31
EMPTY = (4, 4)
"""Width and tokens with which FSDP2 gives the third of three ranks nothing: two of every 4 rows go to each other."""
STEPS, SAMPLES, START = 8, 4, 2
SECTION = {"samples": SAMPLES, "start": START, "ramp_end": 6, "alpha_min": 1e-3, "alpha_max": 1e3}
GROUP_OF = {"embed_tokens": "embedding", "lm_head": "head", "q_proj": "qk", "v_proj": "vo", "up_proj": "mlp"}


class Tiny(nn.Module):
    """Embedding, projections, dropout, BatchNorm, head."""

    def __init__(self, dropout: float = 0.1, width: int = WIDTH, tokens: int = TOKENS) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(tokens, width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.up_proj = nn.Linear(width, width, bias=False)  # a bias before BatchNorm has noise for a gradient
        self.batch_norm = nn.BatchNorm1d(width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.lm_head = nn.Linear(width, tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        x = x + torch.tanh(self.q_proj(x)) * self.v_proj(x)
        x = x + self.dropout(self.batch_norm(self.up_proj(x).flatten(0, 1)).view_as(x))
        logits = self.lm_head(self.norm(x))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def tokens(iteration: int, rank: int = 0, vocabulary: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(100 * iteration + rank)
    return (torch.rand(4, 9, generator=generator) ** 3 * vocabulary).long()


def masks(model: nn.Module) -> dict[str, Tensor]:
    """As `tests.helpers.oracle.models.masks`, of a `Tiny`."""
    every = model.named_parameters()
    return {name: torch.full(p.shape, GROUPS.index(GROUP_OF.get(name.split(".")[0], "other"))) for name, p in every}


def tiny(dropout: float = 0.0) -> Tiny:
    torch.manual_seed(0)
    return Tiny(dropout)


def sharded_by_rows(model: Tiny) -> nn.Module:
    """FSDP2 in two units."""
    fully_shard(model.q_proj)
    return fully_shard(model)


def halves(model: nn.Module) -> list[list[nn.Parameter]]:
    params = list(model.parameters())
    return [params[::2], params[1::2]]


def adamw(params: Any, **more: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, **{"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6, **more})
