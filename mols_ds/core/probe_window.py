"""Restore the state that a probe window changes, so that it leaves no trace in the run."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

from mols_ds.core.module_state import ModuleState

HostRandom = tuple[Any, ...]
"""State of torch's CPU generator (uint8), Python's, and NumPy's (None if NumPy was never imported)."""


def host_random() -> HostRandom:
    """Return the state of this process's CPU generators as plain numbers and a tensor."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return torch.get_rng_state(), random.getstate(), None
    name, key, *rest = numpy.random.get_state(legacy=True)
    return torch.get_rng_state(), random.getstate(), (name, key.tolist(), *rest)


def set_host_random(state: HostRandom) -> None:
    """Set the CPU generators to a state of `host_random`."""
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    numpy = sys.modules.get("numpy")
    if numpy is not None and state[2] is not None:
        numpy.random.set_state(state[2])


class ProbeWindow:
    """Restore three kinds of state, each in its own way.

    - CPU generators. Forward passes of the window draw from a separate stream that starts at the generators' state.
      Draws of other code in the meantime stay: a data loader that starts an epoch inside the window would otherwise
      repeat its order.
    - Module state that a batch changes: restored after each batch. So all samples see one state, and a checkpoint
      inside the window has the state from before it.
    - Engine state (`_begin`, `_end`): the accelerator's generators, counters, and generators of modules. Restored at
      the end of the window, because the samples need different random numbers.

    Each engine adapter has a subclass.

    Attributes:
        passed: whether the current batch had a forward pass.
    """

    def __init__(self, modules: ModuleState) -> None:
        self.modules = modules
        self.passed = False
        self._open = False
        self._stream: HostRandom | None = None  # state for the next pass of the window
        self._outside: HostRandom | None = None  # state outside the pass that runs now
        self._passes = 0  # nested passes that run now: a model may call itself
        self._at_end: torch.Tensor | None = None
        self._generators: list[torch.Tensor] = []
        self._checksums: dict[str, torch.Tensor] | None = (
            None  # taken after the first batch: weights may arrive in its passes
        )
        self._engine: Any = None

    # ------------------------------------------------------------------ for subclasses

    def _begin(self) -> Any:
        """Return the engine state to restore, as tensors, numbers and containers of them."""

    def _end(self, saved: Any) -> None:
        """Restore the result of `_begin`."""

    # ------------------------------------------------------------------ a window

    def open_pass(self) -> None:
        """Call before a forward pass of the window."""
        self._passes += 1
        self.passed = True
        if self._passes > 1:
            return
        self.modules.remember()
        self._outside = host_random()
        if not self._open:
            self._open = True
            self._generators = [generator.get_state() for generator in self.modules.generators()]
            self._engine = self._begin()
        set_host_random(self._stream or self._outside)

    def close_pass(self) -> None:
        """Call after a forward pass, even if it raised. Does nothing without `open_pass`."""
        if self._passes == 0:
            return
        self._passes -= 1
        if self._passes == 0 and self._outside is not None:
            self._stream = host_random()
            set_host_random(self._outside)
            self._outside = None

    def close_batch(self) -> list[str]:
        """Restore module state after a discarded batch, and before a checkpoint. Returns new buffers, which stay."""
        new = self.modules.restore()
        if self._open and self._checksums is None:
            self._checksums = self.modules.checksums()
        return new

    def restore(self) -> list[str]:
        """End the window and restore the rest. Returns the parameters that the window changed; they stay changed."""
        self.close_batch()
        before = self._checksums or {}
        now = self.modules.checksums() if before else {}
        moved = [name for name, value in now.items() if name in before and not torch.equal(value, before[name])]
        if self._open:
            self._end(self._engine)
            for generator, state in zip(self.modules.generators(), self._generators, strict=False):
                generator.set_state(state)
            if self._at_end is not None:
                torch.set_rng_state(self._at_end)
        self.forget()
        return moved

    def forget(self) -> None:
        """Drop all copies."""
        self.modules.forget()
        self._open = False
        self._stream = self._at_end = self._engine = None
        self._generators, self._checksums = [], None

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any] | None:
        """Return this rank's state inside a window for a checkpoint; None outside."""
        if not self._open:
            return None
        kept = {"stream": self._stream, "generators": self._generators, "at_end": self._at_end}
        return {**kept, "engine": self._engine}

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Continue inside the saved window. Copies tensors, so that a memory-mapped file can be closed."""
        self.forget()
        if saved is not None:
            self._open = True
            self._stream, self._generators = copied(saved["stream"]), copied(saved["generators"])
            self._at_end, self._engine = copied(saved["at_end"]), copied(saved["engine"])

    def load_0_4_0(self, cpu: torch.Tensor, engine: Any) -> None:
        """Load a window of release 0.4.0: its passes drew from the CPU generator, which is set to `cpu` at the end."""
        self.load_state_dict({"stream": None, "generators": [], "at_end": cpu, "engine": engine})


def copied(value: Any) -> Any:
    """Copy a container and its tensors."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(copied, value))
    return value
