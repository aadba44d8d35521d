"""Run Megatron-LM's training scripts on a CPU: patches of megatron.training, in addition to `cpu_megatron`."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import importlib.util
import logging
import multiprocessing.spawn
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megatron_patches.compat import LANGUAGE_MODEL, check_modules
from megatron_patches.cpu.emulation import cpu_megatron
from mols_ds.errors import MolsConfigError

COMPILED = "megatron.core.datasets.helpers_cpp"
"""The module that `compile_helpers` compiles. megatron-core's wheel contains it."""
NOISE = "megatron.core.tensor_parallel.random"
"""The logger of a warning about a changed CPU RNG state. Here the CPU's state replaces CUDA's, so it may change."""

MEMORY = ("memory_allocated", "max_memory_allocated", "device_memory_used", "memory_reserved", "max_memory_reserved")
FUSED_ADAM = "--fused-adam"
USAGE = (
    f"usage: python -m megatron_patches.cpu [{FUSED_ADAM}] SCRIPT [ARGUMENTS]; SCRIPT: pretrain_gpt.py in a checkout "
    f"of Megatron-LM; {FUSED_ADAM}: needed to load with --use-distributed-optimizer"
)


_DEVICE = SimpleNamespace(name="cpu", major=8, minor=0, total_memory=0, multi_processor_count=1)
"""What Megatron-LM reads of `torch.cuda.get_device_properties`."""


def run_script(script: str, arguments: Sequence[str], *, fused_adam: bool = False) -> None:
    """Run a training script of Megatron-LM, such as pretrain_gpt.py, on CPU tensors and gloo.

    Imports megatron.training and the script's imports from the script's folder, a checkout of Megatron-LM. Imports the
    installed megatron-core before the checkout's, because it has the compiled dataset helpers.

    Args:
        script: path of the script.
        arguments: of the script; `--distributed-backend gloo --transformer-impl local` and no fused kernels.
        fused_adam: as in `cpu_megatron`; needed to load a checkpoint with `--use-distributed-optimizer`.

    Raises:
        MolsConfigError: missing script, or no megatron.training next to it.
        MolsUnsupportedError: as `cpu_megatron`, or megatron.training lacks a patched name.
    """
    folder = os.path.dirname(os.path.abspath(script))
    if not os.path.isfile(script) or not os.path.isdir(os.path.join(folder, "megatron", "training")):
        raise MolsConfigError(f"{script}: give a training script in a checkout of Megatron-LM, such as pretrain_gpt.py")
    path, argv = list(sys.path), list(sys.argv)
    sys.path.append(folder)
    sys.argv = [script, *arguments]
    try:
        with cpu_megatron(fused_adam=fused_adam), _language_model():
            runpy.run_path(script, run_name="__main__")
    finally:
        if torch.distributed.is_initialized():  # Megatron-LM leaves its groups open
            torch.distributed.destroy_process_group()
        sys.path[:], sys.argv = path, argv


@contextlib.contextmanager
def _language_model() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, create=True, **_devices()))
        check_modules(LANGUAGE_MODEL)
        initialize = importlib.import_module("megatron.training.training").initialize_megatron
        patches: dict[str, object] = {
            "megatron.legacy.fused_kernels.load": _nothing,
            "megatron.training.training.initialize_megatron": functools.partial(initialize, allow_no_cuda=True),
            "multiprocessing.spawn.get_preparation_data": _without_script(multiprocessing.spawn.get_preparation_data),
        }
        if importlib.util.find_spec(COMPILED) is not None:
            patches["megatron.core.datasets.utils.compile_helpers"] = _nothing
        for target, value in patches.items():
            stack.enter_context(mock.patch(target, value))
        logging.getLogger(NOISE).addFilter(_is_no_noise)
        stack.callback(logging.getLogger(NOISE).removeFilter, _is_no_noise)
        yield


def _devices() -> dict[str, Any]:
    """Return replacements of the device queries: one device, without memory statistics."""
    return {
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (_DEVICE.major, _DEVICE.minor),
        "get_device_properties": lambda device=None: _DEVICE,
        "memory_stats": lambda device=None: collections.defaultdict(int),
        "reset_peak_memory_stats": _nothing,
        **dict.fromkeys(MEMORY, lambda *args, **kwargs: 0),
    }


def _nothing(*args: object, **kwargs: object) -> None: ...


def _without_script(stock: Callable[[str], dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """Start the processes of a torch_dist save without the script: importing it there would run on CUDA."""

    def get_preparation_data(name: str) -> dict[str, Any]:
        found = stock(name)
        return {key: value for key, value in found.items() if not key.startswith("init_main_from")}

    return get_preparation_data


def _is_no_noise(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        0, or 2 for a user's mistake, with one line on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    fused_adam = arguments[:1] == [FUSED_ADAM]
    script, *rest = arguments[fused_adam:] or [""]
    if script in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if not script or script.startswith("-"):
            raise MolsConfigError(USAGE)
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron-LM requires it; no effect on a CPU
        run_script(script, rest, fused_adam=fused_adam)
    except MolsConfigError as error:
        print(f"megatron_patches.cpu: {error}", file=sys.stderr)
        return 2
    return 0
