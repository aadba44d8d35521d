"""Speed and memory of a training step: tokens a second, model FLOP/s utilisation (MFU), memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mols_ds.training.batches import MicroBatch

END = object()

PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("H800", 989.0),
    ("GH200", 989.0),
    ("B200", 2250.0),
    ("GB200", 2250.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("MI300X", 1307.0),
    ("MI250X", 383.0),
)
"""(part of the device's name, dense BF16 and FP16 TFLOP/s of its data sheet). The first that matches counts."""


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Return the nominal FLOP/s of a device; None if it is not in `PEAK_TFLOPS`, or not for BF16 and FP16."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS if part in device_name), None)


def flops_per_token(weights: int, layers: int, width: int, length: int) -> float:
    """Return the FLOPs of forward and backward for one token: 6 per weight, and 12 x layers x width x length for
    attention (arXiv 2204.02311, appendix B, which does not halve it for causal masks).

    Args:
        weights: trainable weights that multiply activations: without an embedding that is only looked up.
        layers, width: transformer blocks, and heads x head size.
        length: tokens of a sequence.
    """
    return 6.0 * weights + 12.0 * layers * width * length


def device_name(device: torch.device) -> str:
    """Return the name of an accelerator; "cpu" for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> int:
    """Return the most bytes so far: allocated by torch on the accelerator, or resident of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Waiting:
    """Time that this rank waits for batches, of the time of its steps."""

    seconds: float = 0.0
    seconds_of_steps: float = 0.0

    def timed(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield the batches, and add the time that each takes."""
        while True:
            began = time.monotonic()
            batch = next(batches, END)
            self.seconds += time.monotonic() - began
            if batch is END:
                return
            yield batch

    @property
    def share(self) -> float | None:
        """Seconds of waiting of all; None before the first step."""
        return self.seconds / self.seconds_of_steps if self.seconds_of_steps else None
