"""The handle of users: `engine.mols`, `optimizer.mols`. One class for every engine, also with MoLS off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mols_ds.core.phases import Phase
from mols_ds.errors import MolsUnsupportedError

if TYPE_CHECKING:
    from mols_ds.core.controller import Controller


class Handle:
    """Read the state of MoLS. This base class is the handle with MoLS off (`"enabled": false`): the engine is stock.

    `mols_ds.core.session.Session` is the handle of an engine with MoLS.
    """

    _controller: Controller | None = None

    @property
    def phase(self) -> Phase:
        """Phase of the next step: "waiting", "calibrating", "ramping" or "fixed"; "disabled" if MoLS is off."""
        return "disabled" if self._controller is None else self._controller.phase

    @property
    def alphas(self) -> dict[str, float]:
        """Module group -> multiplier after the ramp, the same on all ranks. Empty before the first calibration ends."""
        return {} if self._controller is None else self._controller.alphas

    @property
    def multipliers(self) -> dict[str, float]:
        """Module group -> multiplier of the last optimizer step. Empty before the first step."""
        return {} if self._controller is None else dict(self._controller.multipliers)

    @property
    def applied_lrs(self) -> dict[str, float]:
        """Module group -> learning rate of the last step.

        If a module group spans several parameter groups (weight decay or not), this is the rate of the parameter group
        with most of its elements on this rank.
        """
        return {} if self._controller is None else dict(self._controller.applied_lrs)

    @property
    def samples(self) -> int:
        """Usable gradient samples of the current or last calibration."""
        return 0 if self._controller is None else self._controller.samples

    @property
    def accumulator_bytes(self) -> int:
        """Bytes of this rank's accumulators now, 8 per element; 0 outside a calibration.

        Without the samples that are kept for the intervals (docs/planning_model.md).
        """
        return 0 if self._controller is None else self._controller.accumulator_bytes

    @property
    def steps(self) -> int:
        """Optimizer steps so far, as `start` and `ramp_end` count them; 0 if MoLS is off."""
        return 0

    def report(self) -> dict[str, Any]:
        """Return a copy of the content of mols_report.json; empty before the first calibration ends."""
        return {} if self._controller is None else self._controller.report()

    def read_gradients(self) -> None:
        """Read the gradients of this step, before the loop clips them. Only plain torch needs this call."""

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state for a checkpoint. Only plain torch: other engines' checkpoints contain it.

        Raises:
            MolsUnsupportedError: the engine is another one, or MoLS is off.
        """
        raise MolsUnsupportedError("the checkpoints of this engine carry the state of MoLS: save with the engine")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Only plain torch.

        Args:
            state: from `state_dict`.

        Raises:
            MolsUnsupportedError: the engine is another one, or MoLS is off.
        """
        raise MolsUnsupportedError("the checkpoints of this engine carry the state of MoLS: load with the engine")

    def resume_from(self, checkpoint_dir: str) -> None:
        """Make the next load read the accumulators of a partial calibration, for the two cases below.

        Args:
            checkpoint_dir: a checkpoint folder of Megatron-core, or of torch.distributed.checkpoint (plain torch).
        """

    def detach(self) -> None:
        """Detach MoLS: from now on the engine runs as a stock one."""
