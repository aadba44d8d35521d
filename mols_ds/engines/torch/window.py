"""State that a probe window restores around a plain torch model; see `mols_ds.core.probe_window`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mols_ds.core.module_state import ModuleState
from mols_ds.core.pieces import local_part
from mols_ds.core.probe_window import ProbeWindow
from mols_ds.core.replaced_methods import ReplacedMethods
from mols_ds.core.session import Session


class TorchWindow(ProbeWindow):
    """Also restores the generator of the accelerator that has the model."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(ModuleState([model], held=local_part))
        self._accelerator: Any = None if device.type == "cpu" else torch.get_device_module(device)

    def _begin(self) -> Any:
        return {"accelerator": None if self._accelerator is None else self._accelerator.get_rng_state()}

    def _end(self, saved: Any) -> None:
        if saved["accelerator"] is not None and self._accelerator is not None:
            self._accelerator.set_rng_state(saved["accelerator"])


def watch_method(mols: Session, owner: nn.Module, name: str) -> ReplacedMethods:
    """Take calls of `owner.name` for forward passes until `undo()`, where a loop does not call the model itself."""

    def call(*args: Any, **kwargs: Any) -> Any:
        mols.before_forward(owner, args)
        try:
            return stock(*args, **kwargs)
        finally:
            mols.after_forward(owner, args, None)

    methods = ReplacedMethods(owner)
    stock = methods.set(name, call)
    return methods
