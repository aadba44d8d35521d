"""State that a probe window restores around a plain torch model; see `mols_ds.core.probe_window`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mols_ds.core.module_state import ModuleState
from mols_ds.core.pieces import local_part
from mols_ds.core.probe_window import ProbeWindow


class TorchWindow(ProbeWindow):
    """Also restores the generator of the accelerator that holds the model."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(ModuleState([model], held=local_part))
        self._accelerator: Any = None if device.type == "cpu" else torch.get_device_module(device)

    def _begin(self) -> Any:
        return {"accelerator": None if self._accelerator is None else self._accelerator.get_rng_state()}

    def _end(self, saved: Any) -> None:
        if saved["accelerator"] is not None and self._accelerator is not None:
            self._accelerator.set_rng_state(saved["accelerator"])
