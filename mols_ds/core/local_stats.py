"""The elements that one rank measures, their accumulators while a calibration runs, and their group sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mols_ds.core.accumulators import STRIDE, Moments
from mols_ds.core.group_stats import GroupSums, NoiseFloor, noise_floor
from mols_ds.core.groups import ElementLayout
from mols_ds.errors import MolsCheckpointError


class Owned(NamedTuple):
    """Elements [start, start + numel) of parameter `name` that this rank measures, at `offset` of its accumulators."""

    name: str
    start: int
    offset: int
    numel: int


def group_index(owned: Sequence[Owned], layouts: Mapping[str, ElementLayout], groups: Sequence[str]) -> Tensor:
    """Group number of every STRIDE-th owned element, for the between-sample blocks; 1-D uint8 (int16 past 255)."""
    number = {group: i for i, group in enumerate(groups)}
    dtype = torch.uint8 if len(groups) <= 255 else torch.int16
    size = sum(piece.numel for piece in owned)
    index = torch.zeros((size + STRIDE - 1) // STRIDE, dtype=dtype)
    for piece in owned:
        first = -piece.offset % STRIDE
        if first >= piece.numel:
            continue
        layout = layouts[piece.name]
        where = (piece.offset + first) // STRIDE
        if len(layout.pattern) == 1:
            index[where : where + -(-(piece.numel - first) // STRIDE)] = number[layout.pattern[0][1]]
            continue
        elements = torch.arange(piece.start + first, piece.start + piece.numel, STRIDE)
        edges = torch.tensor([length for length, _ in layout.pattern]).cumsum(0)
        slot = (elements // layout.inner) % int(edges[-1])
        names = torch.tensor([number[group] for _, group in layout.pattern], dtype=dtype)
        index[where : where + elements.numel()] = names[torch.bucketize(slot, edges, right=True)]
    return index


class OwnedElements:
    """Owned pieces of this rank with what is being measured of them; holds no tensor outside a calibration.

    Attributes:
        pieces: in the order of their offsets, without gaps.
        moments: streaming accumulators between the first sample and `free`, else None.
    """

    def __init__(
        self,
        pieces: Sequence[Owned],
        layouts: Mapping[str, ElementLayout],
        groups: Sequence[str],
        device: torch.device,
    ) -> None:
        self.pieces = list(pieces)
        self.layouts = layouts
        self.groups = tuple(groups)
        self.device = device
        self.numel = sum(piece.numel for piece in self.pieces)
        self.moments: Moments | None = None
        self._squares: GroupSums | None = None

    def _new(self) -> Moments:
        index = group_index(self.pieces, self.layouts, self.groups)
        return Moments(self.numel, device=self.device, group_index=index, n_groups=len(self.groups))

    def open(self) -> None:
        """Begin one gradient sample; allocates the accumulators at the first one."""
        if self.moments is None:
            self.moments = self._new()
        self.moments.open()

    def add(self, offset: int, gradient: Tensor, scale: float) -> None:
        """Gradient of elements [offset, offset + numel) of the open sample, 1-D of any float dtype, times `scale`."""
        assert self.moments is not None, "add outside open and close"
        self.moments.update(offset, gradient, scale)

    def close(self) -> None:
        """End the open sample; every owned element must have been added exactly once."""
        assert self.moments is not None, "close without open"
        self.moments.close()

    def free(self) -> None:
        """Give the memory back."""
        if self.moments is not None:
            self.moments.free()
        self.moments = self._squares = None

    def segments(self) -> list[tuple[ElementLayout, int, int, int]]:
        """(layout, start, offset, numel) of the owned elements; neighbours of one and the same group are merged."""
        merged: list[tuple[ElementLayout, int, int, int]] = []
        for piece in self.pieces:
            layout = self.layouts[piece.name]
            if len(layout.groups) == 1:
                layout = ElementLayout.whole(layout.groups[0])
                if merged and merged[-1][0] == layout and merged[-1][2] + merged[-1][3] == piece.offset:
                    last = merged[-1]
                    merged[-1] = (layout, last[1], last[2], last[3] + piece.numel)
                    continue
            merged.append((layout, piece.start, piece.offset, piece.numel))
        return merged

    def gradient_sums(self) -> GroupSums:
        """This rank's group sums of the samples taken so far."""
        assert self.moments is not None
        blocks = self.moments.block_sums
        floor = noise_floor(self.moments.count)
        sums = GroupSums.zeros(self.groups, floor, len(blocks), self.moments.block_length)
        for layout, start, offset, numel in self.segments():
            sums.add_moments(self.moments, offset, layout, start, numel)
        sums.add_blocks(blocks)
        return sums

    # ------------------------------------------------------------------ mode "moments": Adam's own, no accumulators

    @property
    def has_squares(self) -> bool:
        """Whether group sums of Adam's moments are being collected."""
        return self._squares is not None

    def open_squares(self, floor: NoiseFloor) -> None:
        """Begin to collect group sums of Adam's moments."""
        self._squares = GroupSums.zeros(self.groups, floor)

    def add_squares(self, index: int, mu2: Tensor, s2: Tensor) -> None:
        """Plain mu_i^2 and s_i^2 of piece `index`, 1-D."""
        assert self._squares is not None
        piece = self.pieces[index]
        layout = self.layouts[piece.name]
        pairs = zip(layout.views(mu2, piece.start), layout.views(s2, piece.start), strict=True)
        for (group, mean), (_, spread) in pairs:
            self._squares.add_squares(group, mean, spread)

    def take_squares(self) -> GroupSums:
        """The collected sums of this rank; nothing is kept."""
        assert self._squares is not None
        sums, self._squares = self._squares, None
        return sums

    # ------------------------------------------------------------------ state of a half-done calibration

    def state_dict(self) -> dict[str, Any] | None:
        """This rank's accumulators with the pieces they belong to, or None when there are none."""
        if self.moments is None:
            return None
        return {"owned": [tuple(piece) for piece in self.pieces], "moments": self.moments.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Put the accumulators back. Raises `MolsCheckpointError` where this rank owns other elements or what was saved
        is no state of accumulators."""
        if not isinstance(saved, Mapping) or not {"owned", "moments"} <= set(saved):
            raise MolsCheckpointError("what was saved is no state of accumulators")
        pieces = [saved["owned"]] if not isinstance(saved["owned"], Sequence) else saved["owned"]
        if [tuple(piece) if isinstance(piece, Sequence) else piece for piece in pieces] != self.pieces:
            raise MolsCheckpointError("the saved accumulators belong to other elements than this rank owns")
        moments = self._new()
        moments.load_state_dict(saved["moments"])
        self.moments = moments
