"""What forward and backward passes move in the modules of a model: remembered before a batch, given back after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None))
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> the dtype whose sum tells whether a bit has changed."""
TORCHS = frozenset(vars(nn.Module()))
"""Attributes that every module has: hooks, `training`. They are the caller's to set."""
FP8_TENSORS = ("scale", "scale_inv", "amax_history")
"""Of each entry of `module.fp8_meta` (transformer_engine/pytorch/module/base.py)."""

Held = Callable[[nn.Parameter], Tensor | None]
"""A parameter -> what this rank holds of it in memory."""
Tracker = dict[str, Any]
"""A dict of sums for logging: name -> a tensor, or an entry with the tensor `values`."""


class Seen(NamedTuple):
    """One module before a batch: its buffers, and its numbers, words and tensors that are no buffers."""

    module: nn.Module
    buffers: dict[str, Tensor | None]
    plain: dict[str, Any]


class ModuleState:
    """Buffers and plain attributes of modules, and sums for logging.

    Buffers of every kind: BatchNorm's statistics, moving averages, counters, caches, persistent or not, changed in
    place or replaced. Plain attributes go with them, because caches and schedules note their size or step in one.
    Takes as much memory as the buffers do, on their devices, and only while a batch runs; no device is waited for.

    Parameters are not kept: of them there are checksums, to name those that a forward pass moved.

    Args:
        roots: the modules, with all below them.
        leave: beginnings of the names of attributes that the engine sets.
        trackers: the sums for logging that there are now.
        held: what this rank holds of a parameter.
    """

    def __init__(
        self,
        roots: Sequence[nn.Module],
        leave: tuple[str, ...] = (),
        trackers: Callable[[], Sequence[Tracker]] = tuple,
        held: Held = lambda parameter: parameter,
    ) -> None:
        self.roots, self.leave, self.trackers, self.held = roots, leave, trackers, held
        self._seen: list[Seen] | None = None
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._sums: list[tuple[Tracker, Tracker]] = []

    def remember(self) -> None:
        """Take copies, unless there are some."""
        if self._seen is not None:
            return
        self._seen = [Seen(m, dict(m._buffers), dict(self._plain(m))) for m in self._modules()]
        self._sums = [(tracker, dict(tracker)) for tracker in self.trackers()]
        tensors = {id(tensor): tensor for tensor in self._tensors() if _can_copy(tensor)}
        self._copies = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]

    def restore(self) -> list[str]:
        """Put everything back and drop the copies. Returns the names of buffers that are new; they stay."""
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
        """Generators that modules hold as attributes."""
        attributes = (value for module in self._modules() for value in vars(module).values())
        return [value for value in attributes if isinstance(value, torch.Generator)]

    def checksums(self) -> dict[str, Tensor]:
        """Name -> a number that is another one when a bit of the parameter has changed. Reads every weight once."""
        found: dict[str, Tensor] = {}
        for root in self.roots:
            for name, parameter in root.named_parameters():
                tensor = self.held(parameter)
                if tensor is not None and type(tensor.data) is Tensor and tensor.data.is_floating_point():
                    found[name] = tensor.data.view(INTEGERS[tensor.element_size()]).sum()
        return found

    def _modules(self) -> Iterator[nn.Module]:
        """All but scripted ones, which keep their attributes in C++."""
        every = (module for root in self.roots for module in root.modules())
        return (module for module in every if not isinstance(module, torch.jit.ScriptModule))

    def _plain(self, module: nn.Module) -> Iterator[tuple[str, Any]]:
        """A flag without a buffer beside it says that something is set up, which stays; so do Transformer Engine's."""
        if hasattr(module, "fp8_meta"):
            return
        for name, value in vars(module).items():
            if name in TORCHS or name.startswith(self.leave) or not _is_plain(value):
                continue
            if module._buffers or not isinstance(value, bool):
                yield name, value

    def _tensors(self) -> Iterator[Tensor]:
        """What may change in place."""
        for module, buffers, plain in self._seen or ():
            yield from (value for value in (*buffers.values(), *plain.values()) if isinstance(value, Tensor))
            yield from _fp8_tensors(vars(module).get("fp8_meta"))
        for _, sums in self._sums:
            for entry in sums.values():
                inner = entry.get("values") if isinstance(entry, dict) else getattr(entry, "values", None)
                yield from (value for value in (entry, inner) if isinstance(value, Tensor))


def _is_plain(value: object) -> bool:
    """A number, a word, or a tensor that no graph holds."""
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter) and not value.requires_grad
    return isinstance(value, PLAIN)


def _fp8_tensors(meta: object) -> Iterable[Tensor]:
    """Scales and largest values of Transformer Engine's delayed scaling."""
    for entry in meta.values() if isinstance(meta, dict) else ():
        for name in FP8_TENSORS:
            tensor = getattr(entry, name, None)
            if isinstance(tensor, Tensor):
                yield tensor


def _can_copy(tensor: Tensor) -> bool:
    """Whether it holds values that could change in place: an expanded tensor cannot."""
    if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta or tensor.is_inference():
        return False
    strided = tensor.layout == torch.strided
    return not strided or all(stride or size == 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
