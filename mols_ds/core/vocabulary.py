"""Find the parameters whose rows are tokens, and record which tokens occur.

A row of the output head whose token is no target gets the softmax's push alone: almost the same gradient in every
sample, whatever the data. It says nothing about the noise of the gradient. The same holds for rows of a tied embedding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mols_ds.core.forward_hook import ForwardHook
from mols_ds.core.layout import ElementLayout

CHUNK = 1 << 18
"""Rows per all-reduce of one byte each: 256 KiB."""
_NO_TOKENS = re.compile(r"(?<![a-z])pos(?:itions?|itional)?(?![a-z])|wpe|token_type|segment", re.IGNORECASE)
"""Embeddings of positions and of segments."""


class TokenRows(NamedTuple):
    """Parameters with one row per token, all of `rows` rows.

    Attributes:
        rows: number of tokens, padding included.
        embeddings: names of trainable word embeddings.
        heads: names of weights of the output head; empty if it is tied or frozen, or if there is none.
        widths: name -> elements of a row on this rank.
    """

    rows: int
    embeddings: frozenset[str]
    heads: frozenset[str]
    widths: Mapping[str, int]


def find_vocabulary(
    layouts: Mapping[str, ElementLayout], shapes: Mapping[str, tuple[int, ...]], columns: Mapping[str, int]
) -> TokenRows | None:
    """Find the vocabulary of a model.

    The head with most elements gives the number of rows (adapters of a head have others too), without a head the word
    embedding with most elements.

    Args:
        layouts, shapes: of the logical parameters.
        columns: as in `protocols.Context`.

    Returns:
        None if no parameter has rows for tokens, if the embedding and the head differ in rows, or if rows are in an
        unknown order.
    """
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    of_group: dict[str, list[str]] = {"embedding": [], "head": []}
    for name in matrices:
        group = layouts[name].groups
        if group in (("embedding",), ("head",)) and not (group == ("embedding",) and _NO_TOKENS.search(name)):
            of_group[group[0]].append(name)
    chosen = of_group["head"] or of_group["embedding"]
    if not chosen:
        return None
    largest = max(chosen, key=lambda name: matrices[name][0] * matrices[name][1])
    rows = matrices[largest][0]
    found = {group: frozenset(n for n in names if matrices[n][0] == rows) for group, names in of_group.items()}
    if of_group["embedding"] and not found["embedding"]:
        return None
    if not all(columns.get(name, 1) for names in found.values() for name in names):
        return None
    widths = {name: columns.get(name, matrices[name][1]) for names in found.values() for name in names}
    return TokenRows(rows, found["embedding"], found["head"], widths)


def seen_tokens(
    vocabulary: TokenRows,
    by_ids: Callable[[], Tensor],
    by_gradient: Callable[[], Tensor],
    reduce_max: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """Find the tokens that occurred as inputs; targets are inputs that are shifted by one. Collective.

    Two sources, so that one is enough (a compiled model does not tell ids): the ids that were looked up, and the rows
    of the embedding that moved. Of a tied embedding the softmax moves every row: there only the ids tell, unless some
    rows did not move (no softmax over them, as in an encoder).

    Args:
        vocabulary: the same on every rank.
        by_ids, by_gradient: this rank's tokens, from the look-ups and from the embedding's gradients; uint8 (rows,).
        reduce_max: as in `protocols.Context`.

    Returns:
        bool (rows,) on the CPU; None if neither tells.
    """

    def reduced(flags: Tensor) -> Tensor:
        return torch.cat([reduce_max(part) for part in torch.split(flags, CHUNK)]).bool()

    tied = not vocabulary.heads
    flags = by_ids()
    if vocabulary.embeddings and not tied:
        flags = torch.maximum(flags, by_gradient())
    seen = reduced(flags)
    if tied and not bool(seen.any()):
        seen = reduced(by_gradient())
        seen &= ~seen.all()
    return seen if bool(seen.any()) else None


class TokenIds:
    """Watch the inputs of the word embeddings of this rank, from the first measured pass to the end of a calibration.

    Hooks are registered in the window only: before it, a hook would break the graph of a model that is compiled later.
    A model that is compiled already does not call them.
    """

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        """see: called with the integer ids of each look-up."""
        self._see = see
        self._hooks: list[RemovableHandle] = []

    def follow(self, model: nn.Module, rows: int | None) -> None:
        """Register the hooks on the embeddings with `rows` rows, once; None: remove them. Call before each forward."""
        if rows is None:
            self.remove()
        elif torch.is_grad_enabled() and not self._hooks:
            hook = ForwardHook(self._look)
            self._hooks = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in _embeddings(model, rows)]

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for ids in (*args, *kwargs.values()):
            if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dtype is not torch.bool:
                self._see(ids.detach())
                return


def _embeddings(model: nn.Module, rows: int) -> Iterator[nn.Module]:
    """Yield word embeddings: torch's, or Megatron's, which has the unsharded number of rows (`num_embeddings`)."""
    for name, module in model.named_modules():
        if getattr(module, "num_embeddings", None) == rows and not _NO_TOKENS.search(name):
            yield module


def mark_ids(flags: Tensor, ids: Tensor) -> None:
    """Set flags[id] = 1 in place, without a synchronization.

    Args:
        flags: uint8, (rows + 1,). The last entry is for ids outside of 0 to rows - 1.
        ids: integers of any shape, on the device of `flags`.
    """
    rows = flags.numel() - 1
    flat = ids.reshape(-1).long()
    flags.index_fill_(0, torch.where((flat >= 0) & (flat < rows), flat, rows), 1)


def row_mask(seen: Tensor, start: int, numel: int, width: int) -> Tensor:
    """Return whether each of the elements [start, start + numel) of a flat matrix is in a row that was seen.

    Args:
        seen: bool (rows,).
        start, numel: flat range.
        width: elements per row.

    Returns:
        bool (numel,), on the device of `seen`.
    """
    first, last = start // width, (start + numel - 1) // width
    return seen[first : last + 1].repeat_interleave(width)[start - first * width :][:numel]


def mark_rows(flags: Tensor, start: int, moved: Tensor, width: int) -> None:
    """Set flags[row] = 1 in place for rows with a moved element.

    Args:
        flags: uint8 (rows,), on the CPU.
        start: flat index of the first element.
        moved: bool, 1-D, of consecutive elements.
        width: elements per row.
    """
    lead = start % width
    first = start // width
    rows = -(-(lead + moved.numel()) // width)
    padded = torch.nn.functional.pad(moved, (lead, rows * width - lead - moved.numel()))
    found = padded.view(rows, width).any(1).to("cpu", torch.uint8)
    torch.maximum(flags[first : first + rows], found, out=flags[first : first + rows])
