"""What MoLS is to its user on every engine, and what all ranks do together. Engine-free."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from mols_ds.core.controller import Controller
from mols_ds.core.phases import Phase
from mols_ds.errors import MolsError


class Attached(ABC):
    """Base of the objects that `attach` returns, one class an engine."""

    controller: Controller

    # ------------------------------------------------------------------ what users read

    @property
    def phase(self) -> Phase:
        """ "waiting", "calibrating", "ramping" or "fixed": the phase of the step that comes next."""
        return self.controller.phase

    @property
    def alphas(self) -> dict[str, float]:
        """Module group -> multiplier after the ramp; empty before the calibration has ended. The same on all ranks."""
        return self.controller.alphas

    @property
    def multipliers(self) -> dict[str, float]:
        """Module group -> multiplier that the last optimizer step applied; empty before the first step."""
        return dict(self.controller.multipliers)

    @property
    def applied_lrs(self) -> dict[str, float]:
        """Module group -> learning rate of the last step.

        Where a module group spans several parameter groups (weight decay or not), it is the rate of the one that holds
        most of its elements, as far as this rank knows.
        """
        return dict(self.controller.applied_lrs)

    @property
    def samples(self) -> int:
        """Usable gradient samples of the current or last calibration."""
        return self.controller.samples

    @property
    def accumulator_bytes(self) -> int:
        """Bytes that this rank's accumulators take now; 0 outside a calibration."""
        return self.controller.accumulator_bytes

    def report(self) -> dict[str, Any]:
        """The content of mols_report.json as a dict; empty before the alphas exist."""
        return self.controller.report()

    @abstractmethod
    def detach(self) -> None:
        """Take everything off again: what MoLS was attached to steps as a stock one from here on."""

    # ------------------------------------------------------------------ what all ranks do together

    @abstractmethod
    def reduce(self, values: Tensor) -> Tensor:
        """SUM over the ranks whose owned elements are disjoint. 1-D float64 in, CPU float64 out."""

    def agree(self, ok: bool) -> bool:
        """Whether every rank says True: one all-reduce of 8 bytes."""
        return int(self.reduce(torch.tensor([0.0 if ok else 1.0], dtype=torch.float64)).item()) == 0

    def check_counts(self) -> None:
        """One small reduction: every element of the logical model is owned by exactly one rank.

        Raises MolsError, naming the group and both numbers, on every rank.
        """
        table = self.controller.table
        mine = dict.fromkeys(table.elements, 0)
        for piece in self.controller.elements.pieces:
            for group, count in table.layouts[piece.name].counts(piece.start, piece.numel).items():
                mine[group] += count
        counted = self.reduce(torch.tensor([float(count) for count in mine.values()], dtype=torch.float64)).tolist()
        for group, count in zip(mine, counted, strict=True):
            if int(count) != table.elements[group]:
                raise MolsError(
                    f'group "{group}" has {table.elements[group]} elements in the whole model, but the ranks together '
                    f"own {int(count)}: they do not hold the parts of one model, each once (were all of them given the "
                    "same model config, and all of their part of it?)"
                )
