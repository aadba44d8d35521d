"""Tensors that have shapes and no memory. Engines name devices, so a `TorchFunctionMode` turns each one into meta."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class OnMeta(TorchFunctionMode):
    """Put every new tensor, and every moved one, on the meta device."""

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
