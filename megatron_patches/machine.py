"""What this machine has for low precision: Transformer Engine, apex, the device; and what each recipe needs of it.

Recipes and their least versions: `megatron/core/fp8_utils.py` (`get_fp8_recipe`), `fp4_utils.py`; least compute
capabilities: `check_*_support` in `transformer_engine/pytorch/fp8.py` (`quantization.py` in newer versions).
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import NamedTuple

import torch
from packaging.version import InvalidVersion, Version

Capability = tuple[int, int]


class Recipe(NamedTuple):
    """What a low-precision recipe needs of Transformer Engine, of the device and of CUDA.

    engine: the least version. capability: the least compute capability. below: a compute capability from which on
    Transformer Engine refuses the recipe, or None. cuda: the least version of CUDA, or None.
    """

    engine: str
    capability: Capability
    below: Capability | None = None
    cuda: Capability | None = None


RECIPES: dict[str, Recipe] = {
    "delayed": Recipe("1.0", (8, 9)),  # one scale a tensor, from the largest values of earlier steps
    "tensorwise": Recipe("2.2.0.dev0", (8, 9)),  # one scale a tensor, from its own largest value
    "blockwise": Recipe(
        "2.3.0.dev0", (9, 0), cuda=(12, 9)
    ),  # one fp32 scale a block of 128 (gradients, activations) or 128 x 128
    "mxfp8": Recipe("2.1.0", (10, 0), below=(12, 0)),  # one power of two for each 32 values
    "nvfp4": Recipe("2.7.0.dev0", (10, 0)),  # one FP8 scale for each 16 values of FP4
    "custom": Recipe("2.1.0", (8, 9)),  # whatever the user's quantizer factory does
}


@dataclass(frozen=True)
class Machine:
    """What is installed and what the device can do.

    Attributes:
        engine: version of Transformer Engine, or None where it cannot be imported.
        engine_missing: why not, or "".
        capability: CUDA compute capability of this process's device, or None without one.
        apex: whether NVIDIA apex's FusedAdam can be used (PyPI's `apex` is another package).
        apex_missing: why not, or "".
        wgrad_kernel: whether apex's `fused_weight_gradient_mlp_cuda` is there.
        cuda: version of CUDA that torch was built with, or None without it.
    """

    engine: str | None
    engine_missing: str
    capability: Capability | None
    apex: bool = False
    apex_missing: str = ""
    wgrad_kernel: bool = False
    cuda: Capability | None = None


def find_transformer_engine() -> tuple[str | None, str]:
    """(version, "") of Transformer Engine, or (None, why it cannot be used).

    Its presence on the path is not enough: a wheel that does not fit torch or the driver fails when it is imported.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return None, "the package transformer_engine is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
        version = str(importlib.import_module("transformer_engine").__version__)
        Version(version)
    except (InvalidVersion, AttributeError):
        return None, "the module transformer_engine tells no version: it is not NVIDIA's"
    except Exception as error:  # ImportError, OSError of a missing library, RuntimeError without a driver
        return None, f"transformer_engine is installed but cannot be imported: {_line(error)}"
    return version, ""


def find_apex() -> tuple[bool, str]:
    """(True, "") where NVIDIA apex's FusedAdam can be used, or (False, why not)."""
    if importlib.util.find_spec("apex") is None:
        return False, "the package apex is not installed"
    try:
        importlib.import_module("amp_C")
        importlib.import_module("apex.optimizers").FusedAdam  # noqa: B018  (its absence is what is asked)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return False, f"the package apex is not NVIDIA's, or built without its kernels: {_line(error)}"
    return True, ""


def device_capability() -> Capability | None:
    """Compute capability of this process's CUDA device, or None without one (ROCm has its own numbers: None)."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability()
    return int(major), int(minor)


def cuda_version() -> Capability | None:
    """Version of CUDA that torch was built with, which decides about the matrix products that its libraries have."""
    if torch.version.cuda is None:
        return None
    major, minor = torch.version.cuda.split(".")[:2]
    return int(major), int(minor)


def probe_machine() -> Machine:
    """What this process can use."""
    engine, why = find_transformer_engine()
    apex, why_not = find_apex()
    kernel = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return Machine(engine, why, device_capability(), apex, why_not, kernel, cuda_version())


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
