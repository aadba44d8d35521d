"""State that a probe window restores on a DeepSpeed engine; see `mols_ds.core.probe_window`."""

from __future__ import annotations

from typing import Any

from deepspeed.accelerator import get_accelerator

from mols_ds.core.module_state import ModuleState
from mols_ds.core.probe_window import ProbeWindow, copied
from mols_ds.engines.deepspeed.compat import MODULE_ATTRIBUTES, Engine, local_part, rng_tracker
from mols_ds.engines.deepspeed.parallel.base import ParallelGrid


class EngineWindow(ProbeWindow):
    """Also restores the accelerator's generator, those of DeepSpeed's tracker, and counters of the parallel grid.

    Attributes:
        micro_steps: the engine's count before the current batch; None between batches.
    """

    def __init__(self, engine: Engine, grid: ParallelGrid) -> None:
        super().__init__(ModuleState([engine.module], MODULE_ATTRIBUTES, grid.trackers, local_part))
        self.engine, self.grid = engine, grid
        self.micro_steps: int | None = None

    def open_pass(self) -> None:
        if self.micro_steps is None:
            self.micro_steps = self.engine.micro_steps
        super().open_pass()

    def _begin(self) -> Any:
        self.grid.begin_window()
        accelerator = get_accelerator()
        on_host = accelerator.device_name() == "cpu"  # then it is the host's generator, whose draws stay
        return {
            "accelerator": None if on_host else accelerator.get_rng_state(),
            "tracker": copied(rng_tracker().get_states()),
        }

    def _end(self, saved: Any) -> None:
        if saved["accelerator"] is not None and get_accelerator().device_name() != "cpu":
            get_accelerator().set_rng_state(saved["accelerator"])
        if saved["tracker"]:
            rng_tracker().set_states(saved["tracker"])
        self.grid.end_window()

    def forget(self) -> None:
        super().forget()
        self.grid.window = self.micro_steps = None
