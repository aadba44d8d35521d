"""MoLS switched off on a Megatron optimizer: it steps as stock, and its checkpoints keep a loaded MoLS state."""

from __future__ import annotations

from typing import Any

from megatron_patches.checkpoint import KEY, METHODS, SAMPLES, split_state, state_host
from mols_ds.core.off import OffHandle
from mols_ds.core.replaced_methods import ReplacedMethods


class MegatronOff(OffHandle):
    """Replace the state-dict methods of one `ChainedOptimizer` instance until `detach()`."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self._methods = ReplacedMethods(optimizer)
        self._stock = {name: self._methods.set(name, getattr(self, f"_{name}")) for name in METHODS}

    def detach(self) -> None:
        """Restore the optimizer's methods and drop the kept state. A second call does nothing."""
        self._methods.undo()
        if self.optimizer.__dict__.get("mols") is self:
            del self.optimizer.mols

    def _with_state(self, state: Any) -> Any:
        if self.kept is not None:
            state_host(self.optimizer, state)[KEY] = self.kept
        return state

    def _sharded_state_dict(self, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        state = self._stock["sharded_state_dict"](model_sharded_state_dict, is_loading, **kwargs)
        return state if is_loading else self._with_state(state)

    def _state_dict(self) -> Any:
        return self._with_state(self._stock["state_dict"]())

    def _load_state_dict(self, state_dict: Any) -> None:
        state, saved, _ = split_state(self.optimizer, state_dict)
        self._stock["load_state_dict"](state)
        if isinstance(saved, dict):
            saved = {key: value for key, value in saved.items() if key not in (SAMPLES, "samples_of")}
        self.keep(saved, int(saved.get("steps", 0)) if isinstance(saved, dict) else 0)
