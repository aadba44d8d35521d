"""A small language model as a DeepSpeed PipelineModule, and its reference in one process.

Each layer is built from a seed of its number, so that a stage, another number of stages and the reference have the same
weights.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engines.deepspeed.engines import CLIP, MICROS, config, engine_of
from tests.helpers.oracle.adamw import AdamSettings
from tests.helpers.oracle.models import GROUPS, VOCABULARY, batch, sink_attention

WIDTH, BLOCKS, SEED = 24, 3, 4000

# eps well above the float noise, see test_rates
SETTINGS = AdamSettings(lr=2e-3, eps=1e-4, weight_decay=0.1, vector_lr_factor=2.0, clip=CLIP)
# At stage 0 in fp32, DeepSpeed clips by the norm of the first stage's parameters alone: compared without clipping.
UNCLIPPED = AdamSettings(lr=2e-3, eps=1e-4, weight_decay=0.1, vector_lr_factor=2.0)


# -------------------------------------------------------------------------------------------- layers and the reference


class Block(nn.Module):
    """GPT-2's block with fused rows [q | k | v]; the attention sink makes every gradient real."""

    is_causal = True

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.o_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc_in, self.fc_out = nn.Linear(WIDTH, 2 * WIDTH + 3), nn.Linear(2 * WIDTH + 3, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        heads = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).chunk(3, -1))
        attended = sink_attention(self, *heads, None)[0].flatten(2)
        x = x + self.dropout(self.o_proj(attended))
        return x + self.dropout(self.fc_out(torch.relu(self.fc_in(self.ln_2(x)))))


def embedding() -> nn.Embedding:
    return nn.Embedding(VOCABULARY, WIDTH)


def head_of(embedding: nn.Embedding, x: Tensor) -> Tensor:
    return nn.functional.linear(x, embedding.weight)


def loss_fn(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY).float(), tokens[:, 1:].reshape(-1))


class Reference(nn.Module):
    """All stages in one process, with the names that PipelineModule gives."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        last = BLOCKS + 2
        kinds = [embedding, *[Block] * BLOCKS, lambda: nn.LayerNorm(WIDTH)]
        self.order: list[Any] = []
        if tied:
            self.tied_modules = nn.ModuleDict()
        for number, kind in enumerate(kinds):
            torch.manual_seed(SEED + number)
            layer = kind()
            (self.tied_modules if tied and number == 0 else self).add_module(
                "embed" if tied and number == 0 else str(number), layer
            )
            self.order.append(layer)
        if tied:
            self.order.append(functools.partial(head_of, self.order[0]))
        else:
            torch.manual_seed(SEED + last)
            self.add_module(str(last), nn.Linear(WIDTH, VOCABULARY, bias=False))
            self.order.append(self.get_submodule(str(last)))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x: Any = input_ids
        for layer in self.order:
            x = layer(x)
        return type("Output", (), {"loss": loss_fn(x, labels)})


def pipeline_masks(model: nn.Module) -> dict[str, Tensor]:
    """Index into GROUPS of every element, by hand."""
    table = {"o_proj": "vo", "fc_in": "mlp", "fc_out": "mlp", "c_attn": "qk", "0": "embedding", "embed": "embedding"}
    table[str(BLOCKS + 2)] = "head"
    result = {}
    for name, p in model.named_parameters():
        group = "other" if p.ndim == 1 else table[name.split(".")[-2]]
        result[name] = torch.full(p.shape, GROUPS.index(group))
        if "c_attn.weight" in name:
            result[name][2 * WIDTH :] = GROUPS.index("vo")
    return result


def settings_of(stage: int, dtype: str) -> AdamSettings:
    return UNCLIPPED if stage == 0 and dtype == "float32" else SETTINGS


# ------------------------------------------------------------------------------------------------------------ the ranks


def pipeline_engine(
    tied: bool,
    stage: int,
    dtype: str,
    mols: dict[str, Any] | None,
    *,
    dropout: float = 0.0,
    rules: bool = False,
    stages: int = 2,
    more: dict[str, Any] | None = None,
) -> Any:
    """`more`: further top-level keys of the config."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    first: Any = TiedLayerSpec("embed", nn.Embedding, VOCABULARY, WIDTH) if tied else LayerSpec(embedding_class(rules))
    last: Any = LayerSpec(nn.Linear, WIDTH, VOCABULARY, bias=False)
    if tied:
        last = TiedLayerSpec("embed", nn.Embedding, VOCABULARY, WIDTH, forward_fn=head_of)
    blocks = [LayerSpec(Block, dropout) for _ in range(BLOCKS)]
    module = PipelineModule(
        layers=[first, *blocks, LayerSpec(nn.LayerNorm, WIDTH), last],
        num_stages=stages,
        loss_fn=loss_fn,
        partition_method="uniform",
        seed_layers=True,
        base_seed=SEED,
    )
    settings = settings_of(stage, dtype)
    precision = "bf16" if dtype == "bfloat16" else "fp32"
    ds_config = config(stage, mols, precision=precision, gradient_clipping=settings.clip, **(more or {}))
    return engine_of(ds_config, module, settings, initialize=deepspeed.initialize if mols is None else None)


class Words(nn.Module):
    """An embedding that neither type nor name identifies."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.embedding(x, self.weight)


class Embedding(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(VOCABULARY, WIDTH)


def embedding_class(nameless: bool) -> type[nn.Module]:
    return Words if nameless else Embedding


def feed(iteration: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This data-parallel rank's micro-batches of one global batch."""
    data_rank = dist.get_rank() % (dist.get_world_size() // 2)  # PipeDataParallelTopology: stages first, then data
    for micro in range(MICROS):
        tokens = batch(iteration, micro, data_rank)
        yield tokens, tokens
