"""Save the module state that forward and backward passes change, and restore it after a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None))
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> integer dtype for the checksum."""
MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Attributes of every module: hooks, `training`. Only the caller sets them."""
FP8_TENSORS = ("scale", "scale_inv", "amax_history")
"""Attributes of each entry of `module.fp8_meta` (transformer_engine/pytorch/module/base.py)."""

LocalTensor = Callable[[nn.Parameter], Tensor | None]
"""Parameter -> the tensor that this rank has of it."""
Tracker = dict[str, Any]
"""Sums for logging: name -> a tensor, or an entry with the tensor `values`."""


class Snapshot(NamedTuple):
    """One module before a batch: its buffers, and its plain attributes (numbers, strings, other tensors)."""

    module: nn.Module
    buffers: dict[str, Tensor | None]
    plain: dict[str, Any]


class ModuleState:
    """Save and restore the buffers and plain attributes of modules, and sums for logging.

    Covers buffers of every kind: BatchNorm statistics, moving averages, counters, caches, persistent or not, changed in
    place or replaced. Plain attributes belong to them: caches and schedules store their size or step there. Takes as
    much memory as the buffers, on their devices, while a batch runs. Never synchronizes with a device.

    Does not copy parameters. Checksums name those that a forward pass changed.

    Args:
        roots: modules, with all their submodules.
        leave: name prefixes of attributes that the engine sets.
        trackers: returns the current sums for logging.
        held: returns the tensor that this rank has of a parameter.
    """

    def __init__(
        self,
        roots: Sequence[nn.Module],
        leave: tuple[str, ...] = (),
        trackers: Callable[[], Sequence[Tracker]] = tuple,
        held: LocalTensor = lambda parameter: parameter,
    ) -> None:
        self.roots, self.leave, self.trackers, self.held = roots, leave, trackers, held
        self._seen: list[Snapshot] | None = None
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._sums: list[tuple[Tracker, Tracker]] = []

    def remember(self) -> None:
        """Copy the state, unless a copy exists."""
        if self._seen is not None:
            return
        self._seen = [Snapshot(m, dict(m._buffers), dict(self._plain(m))) for m in self._modules()]
        self._sums = [(tracker, dict(tracker)) for tracker in self.trackers()]
        tensors = {id(tensor): tensor for tensor in self._tensors() if _can_copy(tensor)}
        self._copies = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]

    def restore(self) -> list[str]:
        """Restore everything and drop the copies. Returns the names of new buffers, which stay."""
        seen, self._seen = self._seen, None
        new: list[str] = []
        for module, buffers, plain in seen or ():
            new += [f"{type(module).__name__}.{name}" for name in module._buffers if name not in buffers]
            module._buffers.update(buffers)
            here = vars(module)
            here.update({name: value for name, value in plain.items() if _is_plain(here.get(name))})
        for tracker, sums in self._sums:
            tracker.clear()
            tracker.update(sums)
        for tensor, copy in self._copies:
            if (tensor.shape, tensor.dtype) == (copy.shape, copy.dtype):
                tensor.data.copy_(copy)
            else:  # resized, or converted by `tensor.data = ...`
                tensor.data = copy
        self.forget()
        return new

    def forget(self) -> None:
        """Drop the copies."""
        self._seen, self._copies, self._sums = None, [], []

    def generators(self) -> list[torch.Generator]:
        """Generators that modules have as attributes."""
        attributes = (value for module in self._modules() for value in vars(module).values())
        return [value for value in attributes if isinstance(value, torch.Generator)]

    def checksums(self) -> dict[str, Tensor]:
        """Name -> sum over the bits of the parameter; a changed bit changes it. Reads every weight once."""
        found: dict[str, Tensor] = {}
        for root in self.roots:
            for name, parameter in root.named_parameters():
                tensor = self.held(parameter)
                if tensor is not None and type(tensor.data) is Tensor and tensor.data.is_floating_point():
                    found[name] = tensor.data.view(INTEGERS[tensor.element_size()]).sum()
        return found

    def _modules(self) -> Iterator[nn.Module]:
        """All modules but scripted ones, whose attributes are in C++."""
        every = (module for root in self.roots for module in root.modules())
        return (module for module in every if not isinstance(module, torch.jit.ScriptModule))

    def _plain(self, module: nn.Module) -> Iterator[tuple[str, Any]]:
        """Plain attributes to restore. Not a flag of a module without buffers: it marks a one-time set-up. Not those of
        Transformer Engine."""
        if hasattr(module, "fp8_meta"):
            return
        for name, value in vars(module).items():
            if name in MODULE_ATTRIBUTES or name.startswith(self.leave) or not _is_plain(value):
                continue
            if module._buffers or not isinstance(value, bool):
                yield name, value

    def _tensors(self) -> Iterator[Tensor]:
        """Tensors that a pass may change in place."""
        for module, buffers, plain in self._seen or ():
            yield from (value for value in (*buffers.values(), *plain.values()) if isinstance(value, Tensor))
            yield from _fp8_tensors(vars(module).get("fp8_meta"))
        for _, sums in self._sums:
            for entry in sums.values():
                inner = entry.get("values") if isinstance(entry, dict) else getattr(entry, "values", None)
                yield from (value for value in (entry, inner) if isinstance(value, Tensor))


def _is_plain(value: object) -> bool:
    """Whether it is a number, a string, or a tensor without a graph."""
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter) and not value.requires_grad
    return isinstance(value, PLAIN)


def _fp8_tensors(meta: object) -> Iterable[Tensor]:
    """Scales and amax histories of Transformer Engine's delayed scaling."""
    for entry in meta.values() if isinstance(meta, dict) else ():
        for name in FP8_TENSORS:
            tensor = getattr(entry, name, None)
            if isinstance(tensor, Tensor):
                yield tensor


def _can_copy(tensor: Tensor) -> bool:
    """Whether it has values that can change in place: an expanded tensor has not."""
    if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta or tensor.is_inference():
        return False
    strided = tensor.layout == torch.strided
    return not strided or all(stride or size == 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
