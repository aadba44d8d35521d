"""State that a probe window restores on a Megatron-core optimizer: see `mols_ds.core.probe_window`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from megatron_patches.compat import MODULE_ATTRIBUTES
from megatron_patches.rng_state import accelerator_state, set_accelerator_state, set_tracker_states, tracker_states
from megatron_patches.trackers import trackers
from mols_ds.core.module_state import ModuleState
from mols_ds.core.probe_window import ProbeWindow


class MegatronWindow(ProbeWindow):
    """Also restore the RNG state of CUDA and of Megatron's tracker, and Megatron's sums for logging."""

    def __init__(self, model_chunks: Sequence[nn.Module]) -> None:
        super().__init__(ModuleState(model_chunks, MODULE_ATTRIBUTES, trackers))

    def _begin(self) -> Any:
        return {"accelerator": accelerator_state(), "tracker": tracker_states()}

    def _end(self, saved: Any) -> None:
        set_accelerator_state(saved["accelerator"])
        set_tracker_states(saved["tracker"])
