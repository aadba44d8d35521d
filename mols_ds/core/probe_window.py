"""What a probe window gives back, so that it leaves no trace in the run."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

from mols_ds.core.module_state import ModuleState

HostRandom = tuple[Any, ...]
"""The state of torch's CPU generator (uint8), of Python's, and of NumPy's (None where NumPy was never imported)."""


def host_random() -> HostRandom:
    """The state of the generators of this process that need no accelerator. Plain numbers and a tensor."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return torch.get_rng_state(), random.getstate(), None
    name, key, *rest = numpy.random.get_state(legacy=True)
    return torch.get_rng_state(), random.getstate(), (name, key.tolist(), *rest)


def set_host_random(state: HostRandom) -> None:
    """Set the generators as `host_random` found them."""
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    numpy = sys.modules.get("numpy")
    if numpy is not None and state[2] is not None:
        numpy.random.set_state(state[2])


class ProbeWindow:
    """Three kinds of traces, each given back in its own way.

    - Random numbers on the host. The forward passes of the window draw from a stream of its own, which begins where
      the generators are. What others draw meanwhile stays drawn: a loader that begins an epoch inside the window
      would repeat its order if the generator were set back.
    - What a batch moves in the modules: given back after each batch. So all samples are taken at one state, and a
      checkpoint inside the window holds the state from before it.
    - What the engine advances (`_begin`, `_end`): the accelerator's generators, counters; and generators that modules
      hold. Given back at the end of the window, because the samples need different numbers.

    An adapter subclasses it, one class an engine.

    Attributes:
        passed: whether a forward pass of the batch that runs now was seen.
    """

    def __init__(self, modules: ModuleState) -> None:
        self.modules = modules
        self.passed = False
        self._open = False
        self._stream: HostRandom | None = None  # where the next pass of the window begins to draw
        self._outside: HostRandom | None = None  # the generators while a pass runs
        self._passes = 0  # that run now: a model may call itself
        self._at_end: torch.Tensor | None = None
        self._generators: list[torch.Tensor] = []
        self._checksums: dict[str, torch.Tensor] | None = (
            None  # after the first batch: weights may arrive in its passes
        )
        self._engine: Any = None

    # ------------------------------------------------------------------ what an adapter says

    def _begin(self) -> Any:
        """What `_end` needs, as tensors, numbers and containers of them."""

    def _end(self, saved: Any) -> None:
        """Give back what `_begin` saw."""

    # ------------------------------------------------------------------ a window

    def open_pass(self) -> None:
        """Before a forward pass of the window."""
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
        """After a forward pass, also one that raised; does nothing without `open_pass`."""
        if self._passes == 0:
            return
        self._passes -= 1
        if self._passes == 0 and self._outside is not None:
            self._stream = host_random()
            set_host_random(self._outside)
            self._outside = None

    def close_batch(self) -> list[str]:
        """After a discarded batch, and before a checkpoint: give back what it moved. Returns buffers that stay."""
        new = self.modules.restore()
        if self._open and self._checksums is None:
            self._checksums = self.modules.checksums()
        return new

    def restore(self) -> list[str]:
        """At the end of the window: give back the rest. Returns the parameters that the window moved, which stay so."""
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
        """Drop what is kept."""
        self.modules.forget()
        self._open = False
        self._stream = self._at_end = self._engine = None
        self._generators, self._checksums = [], None

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint inside a window holds of it, on this rank; None outside."""
        if not self._open:
            return None
        kept = {"stream": self._stream, "generators": self._generators, "at_end": self._at_end}
        return {**kept, "engine": self._engine}

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Go on inside the window whose state was saved. Copies, so that a mapped file can be closed."""
        self.forget()
        if saved is not None:
            self._open = True
            self._stream, self._generators = copied(saved["stream"]), copied(saved["generators"])
            self._at_end, self._engine = copied(saved["at_end"]), copied(saved["engine"])

    def load_former(self, cpu: torch.Tensor, engine: Any) -> None:
        """The same from a checkpoint of 0.4.0: passes drew from the CPU generator, which is set to `cpu` at the end."""
        self.load_state_dict({"stream": None, "generators": [], "at_end": cpu, "engine": engine})


def copied(value: Any) -> Any:
    """A container with copies of its tensors."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(copied, value))
    return value
