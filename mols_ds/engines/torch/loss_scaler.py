"""torch's GradScaler in a measured step: its division is no clipping, and discarded steps do not raise its scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mols_ds.core.replaced_methods import ReplacedMethods
from mols_ds.engines.torch.gradient_watch import GradientWatch
from mols_ds.errors import MolsError


class LossScaler:
    """Watch `unscale_` and `update` of one GradScaler until `remove()`.

    Args:
        scaler: of the loop.
        watch: of the gradients.
        has_read: whether the gradients of this step were read before it.
    """

    def __init__(self, scaler: torch.amp.GradScaler, watch: GradientWatch, has_read: Callable[[], bool]) -> None:
        self.scaler, self.watch, self._has_read = scaler, watch, has_read
        self._held = False
        self._methods = ReplacedMethods(scaler)
        self._unscale = self._methods.set("unscale_", self._on_unscale)
        self._update = self._methods.set("update", self._on_update)

    def remove(self) -> None:
        """Restore the scaler's own methods."""
        self._methods.undo()

    def hold(self) -> None:
        """Do not let the next `update` raise the scale: the step was discarded."""
        self._held = True

    def _on_unscale(self, optimizer: torch.optim.Optimizer) -> None:
        if self._has_read():
            raise MolsError(
                "mols.read_gradients() read gradients that GradScaler has not unscaled: call it after "
                "scaler.unscale_(optimizer)"
            )
        clean = not self.watch.problem()
        self._unscale(optimizer)
        if clean:
            self.watch.record()

    def _on_update(self, *args: Any, **kwargs: Any) -> None:
        held, self._held = self._held, False
        before = self.scaler.state_dict()
        self._update(*args, **kwargs)
        if held and before and self.scaler.get_scale() >= before["scale"]:
            self.scaler.load_state_dict(before)
