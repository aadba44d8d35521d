"""The statistics of one rank: owned elements, accumulators during a calibration, group sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.optim import Optimizer

from mols_ds.core.accumulators import Accumulators, AccumulatorsState, Kept
from mols_ds.core.group_stats import GroupSums, NoiseFloor, noise_floor, variance
from mols_ds.core.layout import ElementLayout
from mols_ds.core.pieces import local_part
from mols_ds.core.ranges import ShardRange
from mols_ds.core.replicates import FEWEST, REPLICATES, replicate
from mols_ds.core.sample_blocks import STRIDE, SampleBlocks
from mols_ds.core.subsample import Subsample, choose
from mols_ds.core.vocabulary import TokenRows, mark_ids, mark_rows, row_mask, seen_tokens
from mols_ds.errors import MolsCheckpointError


def group_index(owned: Sequence[ShardRange], layouts: Mapping[str, ElementLayout], groups: Sequence[str]) -> Tensor:
    """Return the group number of every STRIDE-th owned element, for `SampleBlocks`.

    Args:
        owned: this rank's ranges, in the order of the accumulators.
        layouts: parameter name -> layout.
        groups: names; their position is the number.

    Returns:
        1-D on the CPU, uint8 (int16 for more than 255 groups).
    """
    number = {group: i for i, group in enumerate(groups)}
    dtype = torch.uint8 if len(groups) <= 255 else torch.int16
    size = sum(item.numel for item in owned)
    index = torch.zeros((size + STRIDE - 1) // STRIDE, dtype=dtype, device="cpu")
    for item in owned:
        first = -item.offset % STRIDE
        if first >= item.numel:
            continue
        layout = layouts[item.name]
        where = (item.offset + first) // STRIDE
        if len(layout.pattern) == 1:
            index[where : where + -(-(item.numel - first) // STRIDE)] = number[layout.pattern[0][1]]
            continue
        elements = torch.arange(item.start + first, item.start + item.numel, STRIDE, device="cpu")
        edges = torch.tensor([length for length, _ in layout.pattern], device="cpu").cumsum(0)
        slot = (elements // layout.inner) % int(edges[-1])
        names = torch.tensor([number[group] for _, group in layout.pattern], dtype=dtype, device="cpu")
        index[where : where + elements.numel()] = names[torch.bucketize(slot, edges, right=True)]
    return index


PIECE = 1 << 22
"""Elements of a matrix with rows for tokens that are split at a time."""


UNKNOWN = (
    "rows of tokens that do not occur in the samples are measured too, because the tokens are unknown: no "
    "word embedding with the rows of the head was called (inputs_embeds, a compiled model, another number of rows?), "
    'or it is tied in mode "moments". '
    '"mols.unseen_rows": "include" accepts this'
)
OF_0_4_0 = (
    "the checkpoint's samples were begun by release 0.4.0: rows of tokens that do not occur in them are measured too"
)


class SavedStats(TypedDict):
    """One rank's part of a partial calibration in a checkpoint.

    owned: `ShardRange`s of the accumulators, as plain tuples. moments: `Accumulators.state_dict()`. ids: tokens that
    this rank's embeddings looked up, uint8; None without an embedding. Absent in release 0.4.0.
    """

    owned: list[tuple[str, int, int, int]]
    moments: AccumulatorsState
    ids: NotRequired[Tensor | None]


class LocalStats:
    """The elements that this rank owns, and their statistics. Holds no tensor outside a calibration.

    Attributes:
        ranges: owned elements in the accumulators, ordered by offset, without gaps.
        accumulators: None before the first sample and after `free`.
        vocabulary: parameters with one row per token; None: unknown.
        seen: bool (rows,): tokens that occurred on any rank. None: every row counts.
        of_0_4_0: the samples were begun by release 0.4.0, which did not record tokens.
    """

    def __init__(
        self,
        ranges: Sequence[ShardRange],
        layouts: Mapping[str, ElementLayout],
        groups: Sequence[str],
        device: torch.device,
        vocabulary: TokenRows | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.seen: Tensor | None = None
        self.of_0_4_0 = False
        self._ids: Tensor | None = None  # tokens of the samples
        self._new_ids: Tensor | None = None  # of the batches since the last sample
        self.ranges = list(ranges)
        self.layouts = layouts
        self.groups = tuple(groups)
        self.device = device
        self.numel = sum(item.numel for item in self.ranges)
        self.accumulators: Accumulators | None = None
        self._squares: GroupSums | None = None

    def _new(self, of_0_4_0: bool = False) -> Accumulators:
        edges = [*(item.offset for item in self.ranges), self.numel]
        kept: Kept
        if of_0_4_0:
            index = group_index(self.ranges, self.layouts, self.groups)
            kept = SampleBlocks(self.numel, index, len(self.groups), self.device, torch.float32)
        else:
            kept = Subsample(*choose(self.ranges, self.layouts, self.groups), self.device, torch.float32)
        return Accumulators(self.numel, device=self.device, edges=edges, kept=kept)

    def open(self) -> None:
        """Begin a gradient sample. Allocates the accumulators for the first one."""
        if self.accumulators is None:
            self.accumulators = self._new()
        self.accumulators.open()

    def add(self, offset: int, gradient: Tensor, scale: float) -> None:
        """Add gradient * scale for elements [offset, offset + numel) of the open sample; 1-D, any float dtype."""
        assert self.accumulators is not None, "add outside open and close"
        self.accumulators.update(offset, gradient, scale)

    def close(self) -> None:
        """End the open sample. Every owned element must have been added exactly once."""
        assert self.accumulators is not None, "close without open"
        self.accumulators.close()
        if self._new_ids is not None:
            self._ids = (
                self._new_ids if self._ids is None else torch.maximum(self._ids.to(self._new_ids), self._new_ids)
            )
            self._new_ids = None

    def free(self) -> None:
        """Free the accumulators."""
        if self.accumulators is not None:
            self.accumulators.free()
        self.accumulators = self._squares = self.seen = self._ids = self._new_ids = None
        self.of_0_4_0 = False

    # ------------------------------------------------------------------ rows of tokens

    def find_seen(self, by_gradient: Callable[[], Tensor], reduce_max: Callable[[Tensor], Tensor]) -> str | None:
        """Set `seen`. Collective. Returns a warning where every row counts although the model has a head, else None.

        by_gradient, reduce_max: as in `vocabulary.seen_tokens`.
        """
        if self.vocabulary is None:
            return UNKNOWN if "head" in self.groups else None
        if self.of_0_4_0:
            return OF_0_4_0
        self.seen = seen_tokens(self.vocabulary, self.rows_by_ids, by_gradient, reduce_max)
        return UNKNOWN if self.seen is None else None

    def see_ids(self, ids: Tensor) -> None:
        """Record the ids of a look-up; any integer dtype, shape and device. They count if the sample does (`close`)."""
        if self.vocabulary is None:
            return
        ids = local_part(ids)
        if self._new_ids is None:
            self._new_ids = torch.zeros(self.vocabulary.rows + 1, dtype=torch.uint8, device=ids.device)
        mark_ids(self._new_ids, ids.to(self._new_ids.device))

    def drop_ids(self) -> None:
        """Forget the ids of a batch that is no sample."""
        self._new_ids = None

    def rows_by_ids(self) -> Tensor:
        """Tokens that this rank's embeddings looked up: uint8 (rows,) on the CPU."""
        assert self.vocabulary is not None
        flags = torch.zeros(self.vocabulary.rows, dtype=torch.uint8, device="cpu")
        return flags if self._ids is None else self._ids[:-1].cpu()

    def rows_by_gradient(self) -> Tensor:
        """Rows of word embeddings in which an owned element moved in the samples: uint8 (rows,) on the CPU."""
        assert self.vocabulary is not None and self.accumulators is not None
        flags = torch.zeros(self.vocabulary.rows, dtype=torch.uint8, device="cpu")
        for number, item in enumerate(self.ranges):
            if item.name in self.vocabulary.embeddings:
                mean, m2 = item.view(self.accumulators.mean), item.view(self.accumulators.m2)
                self.mark_rows(flags, number, (mean != 0) | (m2 != 0))
        return flags

    def rows_by_moments(
        self, optimizers: Iterable[Optimizer], owned_in: Callable[[Tensor], Sequence[tuple[int, ShardRange]]]
    ) -> Tensor:
        """Rows of word embeddings whose exp_avg_sq is not 0: those that ever had a gradient. uint8 (rows,) on the CPU.

        Moments on NVMe are not read: their rows count as not seen.

        Args:
            optimizers: the inner ones of this rank.
            owned_in: as `Session.owned_in`.
        """
        assert self.vocabulary is not None
        flags = torch.zeros(self.vocabulary.rows, dtype=torch.uint8, device="cpu")
        for optimizer in optimizers:
            # Not by its groups, which ZeRO-3 leaves empty between steps
            for tensor, state in optimizer.state.items():
                if not isinstance(square := state.get("exp_avg_sq"), Tensor):
                    continue
                flat = local_part(square).detach().reshape(-1)  # empty on NVMe
                for number, item in owned_in(tensor):
                    in_memory = flat.numel() >= item.offset + item.numel
                    if in_memory and self.ranges[number].name in self.vocabulary.embeddings:
                        self.mark_rows(flags, number, item.view(flat) != 0)
        return flags

    def mark_rows(self, flags: Tensor, index: int, moved: Tensor, at: int = 0) -> None:
        """Set the flags of rows with a moved element. moved: bool, 1-D, of range `index` from its element `at` on."""
        assert self.vocabulary is not None
        item = self.ranges[index]
        mark_rows(flags, item.start + at, moved, self.vocabulary.widths[item.name])

    def _width(self, name: str) -> int:
        """Return the elements per row of a parameter with one row per token, if tokens were looked for; else 0."""
        return self.vocabulary.widths.get(name, 0) if self.vocabulary is not None and self.seen is not None else 0

    def _split(self, start: int, width: int, first: Tensor, second: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the pairs of (elements in rows that were seen, the others), from element `start` of a parameter on."""
        assert self.seen is not None
        mask = row_mask(self.seen, start, first.numel(), width).to(first.device)
        return [(first[mask], second[mask]), (first[~mask], second[~mask])]

    def segments(self) -> list[tuple[ElementLayout, int, int, int, int]]:
        """(layout, start, offset, numel, row width) of the owned elements; adjacent ranges of one group are merged.

        The width is 0 where all rows count.
        """
        merged: list[tuple[ElementLayout, int, int, int, int]] = []
        for item in self.ranges:
            layout = self.layouts[item.name]
            if width := self._width(item.name):
                merged.append((layout, item.start, item.offset, item.numel, width))
                continue
            if len(layout.groups) == 1:
                layout = ElementLayout.whole(layout.groups[0])
                last = merged[-1] if merged else None
                if last and last[0] == layout and not last[4] and last[2] + last[3] == item.offset:
                    merged[-1] = (layout, last[1], last[2], last[3] + item.numel, 0)
                    continue
            merged.append((layout, item.start, item.offset, item.numel, 0))
        return merged

    def gradient_sums(self) -> GroupSums:
        """Return this rank's group sums of the samples so far."""
        measured = self.accumulators
        assert measured is not None
        kept = measured.kept
        blocks = kept.sums if isinstance(kept, SampleBlocks) else []
        replicates = REPLICATES if isinstance(kept, Subsample) and measured.count >= FEWEST else 0
        sums = GroupSums.zeros(self.groups, noise_floor(measured.count), replicates, len(blocks))
        for layout, start, offset, numel, width in self.segments():
            for begin, end, exponent in measured.exponents.parts(offset, numel):
                mean, m2, first = measured.mean[begin:end], measured.m2[begin:end], start + begin - offset
                if not width:
                    sums.add_range(layout, first, mean, m2, measured.count, exponent)
                    continue
                for at in range(0, end - begin, PIECE):
                    pieces = (values[at : at + PIECE] for values in (mean, m2))
                    seen, unseen = self._split(first + at, width, *pieces)
                    sums.add(layout.groups[0], *seen, measured.count, exponent)
                    sums.leave_out(layout.groups[0], *unseen)
        sums.add_blocks(blocks)
        if replicates and isinstance(kept, Subsample):
            self._replicate(sums, kept, measured)
        return sums

    def _replicate(self, sums: GroupSums, kept: Subsample, measured: Accumulators) -> None:
        """Add the replicates of the elements that are kept, those that the estimators count."""
        places = kept.positions.to(measured.mean.device)
        mean, s2 = measured.mean[places].double(), variance(measured.m2[places], measured.count, 0)
        unit, seen = torch.ones_like(mean), torch.ones_like(places, dtype=torch.bool)
        for begin, end, exponent in measured.exponents.parts(0, self.numel):
            unit[kept.between(begin, end)] = 2.0**-exponent
        for item in self.ranges:
            if width := self._width(item.name):
                part = kept.between(item.offset, item.offset + item.numel)
                assert self.seen is not None
                rows = (kept.positions[part] - item.offset + item.start) // width
                seen[part] = self.seen[rows].to(seen.device)
        counted = seen & (s2 > 0) & torch.isfinite(s2) & torch.isfinite(mean)
        mean, s2 = mean * unit, s2 * unit * unit
        cells, squares = kept.stacked()
        for row, weight in enumerate(kept.weights):
            mine = (counted & (kept.rows.to(places.device) == row)).nonzero()[:, 0]
            if mine.numel():
                scale = unit[mine]
                within = None if squares is None else squares[:, mine].double() * scale * scale
                found = replicate(
                    cells[:, mine].double() * scale, within, mean[mine], s2[mine], measured.count, sums.floor, weight
                )
                sums.add_replicates(row, *found)

    # ------------------------------------------------------------------ mode "moments": Adam's state, no accumulators

    @property
    def has_squares(self) -> bool:
        """Whether sums of Adam's moments are open."""
        return self._squares is not None

    def open_squares(self, floor: NoiseFloor) -> None:
        """Start group sums of Adam's moments."""
        self._squares = GroupSums.zeros(self.groups, floor)

    def add_squares(self, index: int, mu2: Tensor, s2: Tensor, at: int = 0) -> None:
        """Add plain mu_i^2 and s_i^2 (1-D) of range `index`, from its element `at` on."""
        assert self._squares is not None
        item = self.ranges[index]
        layout = self.layouts[item.name]
        start = item.start + at
        if width := self._width(item.name):
            seen, unseen = self._split(start, width, mu2, s2)
            self._squares.add_squares(layout.groups[0], *seen)
            self._squares.leave_out(layout.groups[0], *unseen)
            return
        pairs = zip(layout.views(mu2, start), layout.views(s2, start), strict=True)
        for (group, mean), (_, spread) in pairs:
            self._squares.add_squares(group, mean, spread)

    def take_squares(self) -> GroupSums:
        """Return this rank's sums of Adam's moments and drop them here."""
        assert self._squares is not None
        sums, self._squares = self._squares, None
        return sums

    # ------------------------------------------------------------------ state of a partial calibration

    def state_dict(self) -> SavedStats | None:
        """Return this rank's accumulators and their ranges as plain tuples; None without accumulators."""
        if self.accumulators is None:
            return None
        owned = [(name, start, offset, numel) for name, start, offset, numel in self.ranges]
        return SavedStats(owned=owned, moments=self.accumulators.state_dict(), ids=self._ids)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Load accumulators. Raises `MolsCheckpointError` for another state, or where this rank owns other elements."""
        if not isinstance(saved, Mapping) or not {"owned", "moments"} <= set(saved):
            raise MolsCheckpointError("the saved state is not a state of accumulators")
        ranges = [saved["owned"]] if not isinstance(saved["owned"], Sequence) else saved["owned"]
        if [tuple(item) if isinstance(item, Sequence) else item for item in ranges] != self.ranges:
            raise MolsCheckpointError("the saved accumulators belong to other elements than this rank owns")
        moments = saved["moments"]
        accumulators = self._new(of_0_4_0=isinstance(moments, Mapping) and "block_sums" in moments)
        accumulators.load_state_dict(moments)
        ids = saved.get("ids")
        rows = 0 if self.vocabulary is None else self.vocabulary.rows
        if ids is not None and not (isinstance(ids, Tensor) and ids.dtype == torch.uint8 and ids.shape == (rows + 1,)):
            raise MolsCheckpointError("the saved tokens of the samples are not those of this vocabulary")
        self.accumulators, self.of_0_4_0 = accumulators, "ids" not in saved
        self._ids = None if ids is None else ids.clone()
