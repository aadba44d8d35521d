"""The random state of one rank: remembered at the start of a probe window, given back at its end."""

from __future__ import annotations

from typing import Any

import torch


class RandomState:
    """CPU and accelerator generators and Megatron's tensor-parallel tracker (tensor_parallel/random.py)."""

    def __init__(self) -> None:
        self.saved: dict[str, Any] | None = None

    def remember(self) -> None:
        """Take a copy, unless there is one."""
        if self.saved is None:
            self.saved = {
                "torch": torch.get_rng_state(),
                "accelerator": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
                "tracker": {name: _copy(state) for name, state in _tracker().get_states().items()},
            }

    def restore(self) -> None:
        """Give the copy back and drop it; without one, nothing happens."""
        saved, self.saved = self.saved, None
        if saved is None:
            return
        torch.set_rng_state(saved["torch"])
        if saved["accelerator"] is not None:
            torch.cuda.set_rng_state(saved["accelerator"])
        tracker = _tracker()
        states = tracker.get_states()
        for name, copy in saved["tracker"].items():
            if isinstance(states.get(name), torch.Generator):  # trackers for CUDA graphs hold live generators
                states[name].set_state(copy)
            else:
                states[name] = copy
        tracker.set_states(states)

    def forget(self) -> None:
        """Drop the copy."""
        self.saved = None


def _tracker() -> Any:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return get_cuda_rng_tracker()


def _copy(state: Any) -> Any:
    return state.get_state() if isinstance(state, torch.Generator) else state.clone()
