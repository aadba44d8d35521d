"""The small model of the scenarios and its batches: parameters of every module group, a changing buffer, dropout.

The engine and the reference train the same module. The reference replaces everything around it.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from tests.helpers.oracle.models import ROTARY_GROUPS

TOKENS, WIDTH, INNER, LAYERS, LENGTH, SEQUENCES = 31, 12, 19, 2, 9, 2  # odd sizes: shard boundaries are inside tensors


class Tiny(nn.Module):
    """Two layers with a BatchNorm between them. A batch need not use the MLP of a layer."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList([nn.ModuleDict(_layer()) for _ in range(LAYERS)])
        self.batch_norm = nn.BatchNorm1d(WIDTH, affine=False)  # DeepSpeed casts parameters and keeps buffers in fp32
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, unused: Collection[int] = (), muted: Collection[int] = ()) -> Tensor:
        """Mean next-token cross entropy of tokens (batch, length).

        Args:
            tokens: int64.
            unused: layers whose MLP is skipped: its parameters get no gradient.
            muted: layers whose MLP is multiplied by 0: its parameters get a gradient of 0.
        """
        x = self.embed_tokens(tokens)
        for number, layer in enumerate(self.layers):
            x = x + layer["o_proj"](torch.tanh(layer["q_proj"](x)) * layer["k_proj"](x) + layer["v_proj"](x))
            if number not in unused:
                y = self.dropout(layer["down_proj"](torch.tanh(layer["up_proj"](x))))
                x = x + (0.0 * y if number in muted else y)
            if number == 0:
                x = self.batch_norm(x.float().flatten(0, 1)).view(x.shape).to(x.dtype)
        logits = self.lm_head(self.norm(x))
        return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())


def _layer() -> dict[str, nn.Module]:
    square = {name: nn.Linear(WIDTH, WIDTH, bias=False) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    up, down = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)
    return {**square, "up_proj": up, "down_proj": down}


def tiny(seed: int) -> Tiny:
    """The model with its initial weights, the same for the engine and the reference."""
    generator = torch.Generator().manual_seed(seed + 1)
    state = torch.get_rng_state()
    torch.manual_seed(seed + 1)
    model = Tiny()
    torch.set_rng_state(state)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def batch(seed: int, number: int, micro: int, rank: int) -> Tensor:
    """Int64 (SEQUENCES, LENGTH). Low token ids are frequent, so some rows of the embedding get no gradient."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + 1_000 * number + 10 * micro + rank)
    return (torch.rand(SEQUENCES, LENGTH, generator=generator) ** 3 * TOKENS).long()


def group_of(name: str, by_layer: bool = False) -> str:
    """The module group of a parameter (docs/method.md). With `by_layer`, one group for each layer and type."""
    group = next((group for ending, group in ROTARY_GROUPS.items() if name.endswith(f"{ending}.weight")), "other")
    if by_layer and name.startswith("layers.") and group != "other":
        return f"{group}.{name.split('.')[1]}"
    return group


def random_state(seed: int, number: int, rank: int) -> int:
    """The torch seed of a rank after start or resume number `number`."""
    return 7_919 * seed + 101 * number + rank
