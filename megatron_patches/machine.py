"""Low-precision support of this machine (Transformer Engine, apex, device), and the requirements of each recipe.

Recipes and minimum versions: `megatron/core/fp8_utils.py` (`get_fp8_recipe`), `fp4_utils.py`. Minimum compute
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
    """Requirements of a low-precision recipe.

    engine: minimum version of Transformer Engine. capability: minimum compute capability. below: Transformer Engine
    rejects the recipe from this compute capability on, or None. cuda: minimum version of CUDA, or None.
    """

    engine: str
    capability: Capability
    below: Capability | None = None
    cuda: Capability | None = None


RECIPES: dict[str, Recipe] = {
    "delayed": Recipe("1.0", (8, 9)),  # one scale per tensor, from the maxima of earlier steps
    "tensorwise": Recipe("2.2.0.dev0", (8, 9)),  # one scale per tensor, from its own maximum
    "blockwise": Recipe(
        "2.3.0.dev0", (9, 0), cuda=(12, 9)
    ),  # one fp32 scale per block of 128 (gradients, activations) or 128 x 128
    "mxfp8": Recipe("2.1.0", (10, 0), below=(12, 0)),  # one power of two per 32 values
    "nvfp4": Recipe("2.7.0.dev0", (10, 0)),  # one FP8 scale per 16 values of FP4
    "custom": Recipe("2.1.0", (8, 9)),  # the user's quantizer factory
}


@dataclass(frozen=True)
class Machine:
    """Installed packages and capabilities of the device.

    Attributes:
        engine: version of Transformer Engine, or None where the import fails.
        engine_missing: the reason, or "".
        capability: CUDA compute capability of this process's device, or None without one.
        apex: whether NVIDIA apex's FusedAdam works (PyPI's `apex` is another package).
        apex_missing: the reason, or "".
        wgrad_kernel: whether apex's `fused_weight_gradient_mlp_cuda` is installed.
        cuda: torch's CUDA version, or None without CUDA.
    """

    engine: str | None
    engine_missing: str
    capability: Capability | None
    apex: bool = False
    apex_missing: str = ""
    wgrad_kernel: bool = False
    cuda: Capability | None = None


def find_transformer_engine() -> tuple[str | None, str]:
    """Return (version, "") of Transformer Engine, or (None, why it does not work).

    Imports it: a wheel that does not fit torch or the driver is installed, but its import fails.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return None, "the package transformer_engine is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
        version = str(importlib.import_module("transformer_engine").__version__)
        Version(version)
    except (InvalidVersion, AttributeError):
        return None, "the module transformer_engine has no version: it is not NVIDIA's"
    except Exception as error:  # ImportError, OSError of a missing library, RuntimeError without a driver
        return None, f"transformer_engine is installed but cannot be imported: {_line(error)}"
    return version, ""


def find_apex() -> tuple[bool, str]:
    """Return (True, "") where NVIDIA apex's FusedAdam works, or (False, why not)."""
    if importlib.util.find_spec("apex") is None:
        return False, "the package apex is not installed"
    try:
        importlib.import_module("amp_C")
        importlib.import_module("apex.optimizers").FusedAdam  # noqa: B018  (raises where it is missing)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return False, f"the package apex is not NVIDIA's, or built without its kernels: {_line(error)}"
    return True, ""


def device_capability() -> Capability | None:
    """Return the compute capability of this process's CUDA device, or None without one and on ROCm."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability()
    return int(major), int(minor)


def cuda_version() -> Capability | None:
    """Return torch's CUDA version, which determines the matrix products in its libraries."""
    if torch.version.cuda is None:
        return None
    major, minor = torch.version.cuda.split(".")[:2]
    return int(major), int(minor)


def probe_machine() -> Machine:
    """Return the packages and the device of this process."""
    engine, why = find_transformer_engine()
    apex, why_not = find_apex()
    kernel = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return Machine(engine, why, device_capability(), apex, why_not, kernel, cuda_version())


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
