"""RNG state of one rank: CPU and accelerator generators, and Megatron's tracker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class RandomState:
    """RNG state of the CPU, the accelerator and Megatron's tensor-parallel tracker (tensor_parallel/random.py)."""

    def __init__(self) -> None:
        self.saved: dict[str, Any] | None = None

    def remember(self) -> None:
        """Save a copy, unless one exists."""
        if self.saved is None:
            self.saved = {
                "torch": torch.get_rng_state(),
                "accelerator": accelerator_state(),
                "tracker": tracker_states(),
            }

    def restore(self) -> None:
        """Restore the copy and drop it. Does nothing without a copy."""
        saved, self.saved = self.saved, None
        if saved is None:
            return
        torch.set_rng_state(saved["torch"])
        set_accelerator_state(saved["accelerator"])
        set_tracker_states(saved["tracker"])


def accelerator_state() -> Tensor | None:
    """Return the RNG state of this rank's CUDA device; None without one."""
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_accelerator_state(state: Tensor | None) -> None:
    """Set the RNG state from `accelerator_state`. None: does nothing."""
    if state is not None:
        torch.cuda.set_rng_state(state)


def tracker_states() -> dict[str, Tensor]:
    """Return copies of the states of Megatron's `CudaRNGStatesTracker`: name -> RNG state."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = get_cuda_rng_tracker().get_states().items()
    return {name: s.get_state() if isinstance(s, torch.Generator) else s.clone() for name, s in states}


def set_tracker_states(copies: Mapping[str, Tensor]) -> None:
    """Set the states of Megatron's tracker from `tracker_states`."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    for name, copy in copies.items():
        live = states.get(name)
        if isinstance(live, torch.Generator):  # trackers for CUDA graphs hold generators
            live.set_state(copy)
        else:
            states[name] = copy
    tracker.set_states(states)
