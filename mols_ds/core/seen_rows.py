"""Find the tokens that occurred in the samples, so that the rows of the others can be left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from mols_ds.core.local_stats import LocalStats
from mols_ds.core.ranges import ShardRange
from mols_ds.core.vocabulary import seen_tokens

UNKNOWN = (
    "rows of tokens that do not occur in the samples are measured too, because the tokens are unknown: no "
    "word embedding with the rows of the head was called (inputs_embeds, a compiled model, another number of rows?). "
    '"mols.unseen_rows": "include" accepts this'
)
OF_0_4_0 = (
    "the checkpoint's samples were begun by release 0.4.0: rows of tokens that do not occur in them are measured too"
)


def find_seen(
    elements: LocalStats,
    by_gradient: Callable[[], Tensor],
    reduce_max: Callable[[Tensor], Tensor],
) -> str | None:
    """Set `elements.seen`. Collective.

    Args:
        elements: of this rank.
        by_gradient: as in `vocabulary.seen_tokens`.
        reduce_max: as in `protocols.Context`.

    Returns:
        A warning where every row counts, although the model has a head; else None.
    """
    if elements.vocabulary is None:
        return UNKNOWN if "head" in elements.groups else None
    if elements.of_0_4_0:
        return OF_0_4_0
    elements.seen = seen_tokens(elements.vocabulary, elements.rows_by_ids, by_gradient, reduce_max)
    return UNKNOWN if elements.seen is None else None


def rows_with_moments(
    optimizers: Iterable[Optimizer],
    owned_in: Callable[[Tensor], Sequence[tuple[int, ShardRange]]],
    elements: LocalStats,
) -> Tensor:
    """Return the rows of word embeddings whose exp_avg_sq is not 0: those that ever had a gradient.

    Moments on NVMe are not read: their rows count as not seen.

    Args:
        optimizers: the inner ones of this rank.
        owned_in: as `Session.owned_in`.
        elements: of this rank, with a vocabulary.

    Returns:
        uint8 (rows,) on the CPU.
    """
    vocabulary = elements.vocabulary
    assert vocabulary is not None
    flags = torch.zeros(vocabulary.rows, dtype=torch.uint8, device="cpu")
    for optimizer in optimizers:
        for tensor in (tensor for group in optimizer.param_groups for tensor in group["params"]):
            square = optimizer.state.get(tensor, {}).get("exp_avg_sq")
            for number, item in owned_in(tensor):
                in_memory = isinstance(square, Tensor) and square.numel() >= item.offset + item.numel
                if in_memory and elements.ranges[number].name in vocabulary.embeddings:
                    elements.mark_rows(flags, number, item.view(square.detach().reshape(-1)) != 0)
    return flags
