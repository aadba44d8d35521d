"""Weigh the living tensors of a DeepSpeed engine by kind, at every collective. For plan_measure.py."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef


class Scale:
    """Bytes of the living tensors of a DeepSpeed engine by kind; the largest of each kind that was seen."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.peak: Counter[str] = Counter()
        self.known = set(_alive())  # what exists before the first weighing and belongs to no kind
        self.saved: dict[int, StorageWeakRef] = {}

    def weigh(self) -> None:
        """Classify every tensor storage that Python can reach: what belongs to no other kind is a buffer."""
        kinds = {kind: dict(storages(tensors)) for kind, tensors in self._owners().items()}
        owned = {address for of in kinds.values() for address in of}
        activations = {address for address, ref in self.saved.items() if not ref.expired()} - owned
        alive = {address: size for address, size in _alive().items() if address not in activations}
        held: Counter[str] = Counter()
        for address, size in alive.items():
            kind = next((name for name, of in kinds.items() if address in of), None)
            if kind is not None or address not in self.known:
                held[kind or "buffers"] += size
        for kind, size in held.items():
            self.peak[kind] = max(self.peak[kind], size)

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        """For autograd's hooks: what the backward pass needs is weighed apart (`saved_bytes`)."""
        storage = tensor.untyped_storage()
        self.saved[storage.data_ptr()] = StorageWeakRef(storage)
        return tensor

    def _owners(self) -> dict[str, list[Any]]:
        engine, outer = self.engine, self.engine.optimizer
        inner = getattr(outer, "optimizer", outer)
        parameters = list(engine.module.parameters())
        buckets = [bucket.buffer for bucket in getattr(outer, "ipg_buckets", {}).values()]
        whole = [p.data for p in parameters if hasattr(p, "ds_tensor") and not p.ds_persist]
        moments = engine.mols.controller.elements.accumulators
        return {
            "buffers": [buckets, whole, *(getattr(outer, name, None) for name in OFFLOADED)],
            "weights": [parameters, [getattr(p, "ds_tensor", None) for p in parameters]],
            "optimizer": [
                *(group["params"] for group in inner.param_groups),
                list(inner.state.values()),
                *(getattr(outer, name, None) for name in MASTERS),
            ],
            "gradients": [
                [p.grad for p in parameters],
                [t.grad for t in _tensors([getattr(outer, name, None) for name in MASTERS]) if t.is_leaf],
                [t.grad for group in inner.param_groups for t in group["params"]],
                *(getattr(outer, name, None) for name in GRADIENTS),
            ],
            "accumulators": [] if moments is None else [list(vars(moments).values())],
        }


MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
OFFLOADED = (
    "temp_grad_buffer_for_cpu_offload",
    "temp_grad_buffer_for_gpu_offload",
    "param_buffer_of_bit16_for_cpu_offload_groups",
)
GRADIENTS = (
    "averaged_gradients",
    "all_grad_tensors",
    "grads_in_partition",
    "grad_partitions_flat_buffer",
    "fp32_groups_gradients_flat",
    "accumulated_grads_in_cpu",
)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif hasattr(value, "__iter__") and not isinstance(value, str | bytes):
        for item in value:
            yield from _tensors(item)


def storages(value: Any) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the storage of every tensor in nested containers."""
    for tensor in _tensors(value):
        storage = tensor.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()


def _alive() -> dict[int, int]:
    """Address -> bytes of every tensor storage that Python can reach."""
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type != "meta" and thing.grad_fn is None:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


WEIGHED = ("copy_grads_in_partition", "_muon_update_lacks_loss_scale", "flatten")
"""Methods of DeepSpeed's optimizers after which something is largest that no collective sees."""


def _weighed_after(method: Any, scale: Scale) -> Any:
    def weighed(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        scale.weigh()
        return result

    return weighed


@contextmanager
def weighing(scale: Scale) -> Iterator[None]:
    """Weigh at the entry of every collective of torch's process groups."""
    from tests.helpers.recorder import METHODS

    undo, outer = [], scale.engine.optimizer
    methods = {name: vars(outer).get(name) for name in WEIGHED if hasattr(outer, name)}
    for name in methods:
        setattr(outer, name, _weighed_after(getattr(outer, name), scale))
    for name in METHODS:
        original, stored = getattr(dist.ProcessGroup, name), vars(dist.ProcessGroup)[name]

        def weighed(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            scale.weigh()
            return _original(*args, **kwargs)

        undo.append((name, stored))
        setattr(dist.ProcessGroup, name, weighed)
    try:
        yield
    finally:
        for name, own in methods.items():
            delattr(outer, name)
            if own is not None:
                setattr(outer, name, own)
        for name, stored in undo:
            setattr(dist.ProcessGroup, name, stored)
