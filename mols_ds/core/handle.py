"""What users hold: `engine.mols`, `optimizer.mols`. One class for every engine, MoLS switched off included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mols_ds.core.phases import Phase

if TYPE_CHECKING:
    from mols_ds.core.controller import Controller


class Handle:
    """Reads the state of MoLS. As it is made here, MoLS is off (`"enabled": false`): the engine is exactly stock.

    The sessions of the engines (`mols_ds.core.session.Session`) are handles with a controller behind them.
    """

    _controller: Controller | None = None

    @property
    def phase(self) -> Phase:
        """ "waiting", "calibrating", "ramping" or "fixed": the phase of the next step. "disabled" where MoLS is off."""
        return "disabled" if self._controller is None else self._controller.phase

    @property
    def alphas(self) -> dict[str, float]:
        """Module group -> multiplier after the ramp, the same on all ranks. Empty before the calibration has ended."""
        return {} if self._controller is None else self._controller.alphas

    @property
    def multipliers(self) -> dict[str, float]:
        """Module group -> multiplier that the last optimizer step applied. Empty before the first step."""
        return {} if self._controller is None else dict(self._controller.multipliers)

    @property
    def applied_lrs(self) -> dict[str, float]:
        """Module group -> learning rate of the last step.

        Where a module group spans several parameter groups (weight decay or not), it is the rate of the one that holds
        most of its elements, as far as this rank knows.
        """
        return {} if self._controller is None else dict(self._controller.applied_lrs)

    @property
    def samples(self) -> int:
        """Usable gradient samples of the current or last calibration."""
        return 0 if self._controller is None else self._controller.samples

    @property
    def accumulator_bytes(self) -> int:
        """Bytes that this rank's accumulators take now; 0 outside a calibration."""
        return 0 if self._controller is None else self._controller.accumulator_bytes

    @property
    def steps(self) -> int:
        """Optimizer steps so far, as "mols.start" and "mols.ramp_end" count them; 0 where MoLS is off."""
        return 0

    def report(self) -> dict[str, Any]:
        """The content of mols_report.json as a dict; empty before the alphas exist."""
        return {} if self._controller is None else self._controller.report()

    def resume_from(self, checkpoint_dir: str) -> None:
        """Ask the next load for the accumulators of a half-done calibration. Only Megatron's needs to be asked."""

    def detach(self) -> None:
        """Undo the attachment: the engine steps as a stock one from here on."""
