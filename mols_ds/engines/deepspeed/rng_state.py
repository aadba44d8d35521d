"""What a probe window gives back on a DeepSpeed engine: the random state, and what the parallel grid counts."""

from __future__ import annotations

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from mols_ds.engines.deepspeed.parallel.base import ParallelGrid


class EngineWindow:
    """What forward passes advance: torch's random state, and what the grid keeps beside it.

    Attributes:
        saved: the CPU's and the accelerator's random state at the start of the window, uint8; None outside.
    """

    def __init__(self, grid: ParallelGrid) -> None:
        self.grid = grid
        self.saved: tuple[Tensor, Tensor] | None = None

    def remember(self) -> None:
        """Take a copy, unless there is one."""
        if self.saved is None:
            self.saved = (torch.get_rng_state(), get_accelerator().get_rng_state())
            self.grid.begin_window()

    def restore(self) -> None:
        """Put the copy back and drop it. Does nothing without one."""
        saved, self.saved = self.saved, None
        if saved is not None:
            torch.set_rng_state(saved[0])
            get_accelerator().set_rng_state(saved[1])
            self.grid.end_window()

    def forget(self) -> None:
        """Drop the copy."""
        self.saved = self.grid.window = None
