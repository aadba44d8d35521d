"""Plain torch optimizers with MoLS off: stock, except that updates are counted for the state of a loaded checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from mols_ds.core.off import OffHandle
from mols_ds.engines.torch.checkpoint import COMMON, pack_common, unpack_common


class TorchOff(OffHandle):
    """Keep the MoLS state of a loaded checkpoint, for later checkpoints."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._updates = 0
        self._hook = optimizers[0].register_step_post_hook(self._count)

    @property
    def steps(self) -> int:
        """Updates so far."""
        return self._updates

    def _count(self, *args: object) -> None:
        self._updates += 1

    def detach(self) -> None:
        """Stop counting."""
        self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the loaded checkpoint; {} without one."""
        return {} if self.kept is None else {COMMON: pack_common(self.kept, self.steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep a state for later checkpoints. Warns that the multipliers are off."""
        if not state:
            return
        common, self._updates = unpack_common(state)
        self.keep(common, self._updates)
