"""A recorder of every collective: what torch's process groups send, and what DeepSpeed's functions were asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch.distributed as dist
from torch import Tensor

# Every communicating method of torch's ProcessGroup. The functions of torch.distributed, and references to them that
# DeepSpeed took earlier, all end in one of these, so patching the class misses none.
METHODS = tuple(
    name
    for name in (
        "allreduce",
        "allreduce_coalesced",
        "reduce",
        "broadcast",
        "allgather",
        "_allgather_base",
        "allgather_coalesced",
        "allgather_into_tensor_coalesced",
        "gather",
        "scatter",
        "reduce_scatter",
        "_reduce_scatter_base",
        "reduce_scatter_tensor_coalesced",
        "alltoall",
        "alltoall_base",
        # the names of later torch releases
        "all_gather_single",
        "all_gather_single_coalesced",
        "reduce_scatter_single",
        "reduce_scatter_single_coalesced",
        "all_to_all_single",
        "send",
        "recv",
        "recv_anysource",
        "barrier",
        "monitored_barrier",
    )
    if hasattr(dist.ProcessGroup, name)
)
DEEPSPEED = (
    "all_reduce",
    "all_reduce_coalesced",
    "inference_all_reduce",
    "reduce",
    "broadcast",
    "broadcast_object_list",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "allgather_fn",
    "all_gather_object",
    "gather",
    "scatter",
    "reduce_scatter",
    "reduce_scatter_fn",
    "reduce_scatter_tensor",
    "all_to_all",
    "all_to_all_single",
    "send",
    "recv",
    "isend",
    "irecv",
    "barrier",
    "monitored_barrier",
)


class Recorder:
    """Context manager; `.torch` and `.deepspeed` count (operation, bytes of its tensors) of this rank."""

    def __init__(self) -> None:
        self.torch: Counter[tuple[str, int]] = Counter()
        self.deepspeed: Counter[tuple[str, int]] = Counter()
        self._undo: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Recorder:
        for name in METHODS:
            self._patch(dist.ProcessGroup, name, self.torch)
        for name in DEEPSPEED:
            self._patch(deepspeed.comm, name, self.deepspeed)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in reversed(self._undo):
            setattr(owner, name, original)
        self._undo.clear()

    def _patch(self, owner: Any, name: str, counter: Counter[tuple[str, int]]) -> None:
        original, stored = getattr(owner, name), vars(owner)[name]  # pybind methods bind only as stored

        def recorded(*args: Any, **kwargs: Any) -> Any:
            counter[name, sum(_sizes([args, kwargs.values()]))] += 1
            return original(*args, **kwargs)

        self._undo.append((owner, name, stored))
        setattr(owner, name, recorded)


def _sizes(value: Any) -> Iterable[int]:
    if isinstance(value, Tensor):
        yield value.numel() * value.element_size()
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for part in value:
            yield from _sizes(part)
