"""torch's GradScaler in a measured step: its division is no clipping, and discarded steps do not raise its scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mols_ds.core.replaced_methods import ReplacedMethods
from mols_ds.engines.torch.gradient_watch import GradientWatch
from mols_ds.errors import MolsError


class LossScaler:
    """Watch `unscale_` and `update` of one GradScaler until `methods.undo()`.

    Args:
        scaler: of the loop.
        watch: of the gradients.
    """

    def __init__(self, scaler: torch.amp.GradScaler, watch: GradientWatch) -> None:
        self.scaler, self.watch = scaler, watch
        self._held = False
        self._unscaled: set[int] = set()  # ids of the optimizers whose gradients are divided already
        self.methods = ReplacedMethods(scaler)
        self._unscale = self.methods.set("unscale_", self._on_unscale)
        self._update = self.methods.set("update", self._on_update)

    def hold(self) -> None:
        """Do not let the next `update` raise the scale: the step was discarded."""
        self._held = True

    def scale(self, optimizers: Sequence[torch.optim.Optimizer]) -> float:
        """Return the loss scale in the gradients now: 1 after `unscale_`.

        Raises:
            MolsError: only some of the optimizers are unscaled.
        """
        done = {id(optimizer) in self._unscaled for optimizer in optimizers}
        if len(done) > 1:
            raise MolsError(
                "mols.read_gradients(): GradScaler has unscaled some of the optimizers only: call it before the first "
                "scaler.unscale_(optimizer) or after the last"
            )
        return 1.0 if True in done else float(self.scaler.get_scale())

    def _on_unscale(self, optimizer: torch.optim.Optimizer) -> None:
        clean = not self.watch.problem()
        self._unscale(optimizer)
        self._unscaled.add(id(optimizer))
        if clean:
            self.watch.record()

    def _on_update(self, *args: Any, **kwargs: Any) -> None:
        held, self._held = self._held, False
        self._unscaled.clear()
        before = self.scaler.state_dict()
        self._update(*args, **kwargs)
        if held and before and self.scaler.get_scale() >= before["scale"]:
            self.scaler.load_state_dict(before)
