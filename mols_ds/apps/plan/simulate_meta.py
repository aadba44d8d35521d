"""A world of any number of ranks in one process, with tensors that have shapes and no memory.

Two things of torch make it: the process-group backend "fake" (torch/testing/_internal/distributed/fake_pg.py), whose
collectives return at once and leave their outputs as they are, and the meta device. Engines name other devices, so a
`TorchFunctionMode` turns each device that is named into meta.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.overrides import TorchFunctionMode

from mols_ds.errors import MolsUnsupportedError


class OnMeta(TorchFunctionMode):
    """Every new tensor is on the meta device, whatever device is asked for, and every move leads there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.cpu, Tensor.cuda, Tensor.pin_memory):
            return args[0]
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], str | torch.device):
            args = (args[0], "meta", *args[2:])
        result = func(*args, **kwargs)
        if func is Tensor.type and isinstance(result, str):
            return result.replace(".meta", "")
        return result


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """No tensor that is made inside has memory."""
    with torch.device("meta"), OnMeta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of engines that miss their GPU kernels
        yield


@contextlib.contextmanager
def fake_world(rank: int, ranks: int) -> Iterator[None]:
    """Be rank `rank` of `ranks` in `torch.distributed`, alone.

    Raises MolsUnsupportedError where this process has joined a process group already.
    """
    if dist.is_initialized():
        raise MolsUnsupportedError(
            "simulated ranks need a process of their own, and this one is part of a process group: run "
            "python -m mols_ds.plan.simulate"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
