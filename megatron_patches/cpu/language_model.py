"""Megatron-LM's own training scripts on a CPU: what the package megatron.training needs beside `cpu_megatron`."""

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
from typing import Any, NamedTuple

import torch

from megatron_patches.compat import LANGUAGE_MODEL, check_modules
from megatron_patches.cpu.emulation import cpu_megatron
from megatron_patches.monkeypatch import Patches
from mols_ds.errors import MolsConfigError

COMPILED = "megatron.core.datasets.helpers_cpp"
"""What `compile_helpers` compiles; megatron-core's wheel has it."""
NOISE = "megatron.core.tensor_parallel.random"
"""Its warning that the CPU's random state has changed is wrong where that stands for CUDA's."""

FUSED_ADAM = "--fused-adam"
USAGE = (
    f"usage: python -m megatron_patches.cpu [{FUSED_ADAM}] SCRIPT [ARGUMENTS]; SCRIPT: pretrain_gpt.py in a checkout "
    f"of Megatron-LM; {FUSED_ADAM}: needed to load with --use-distributed-optimizer"
)


class _Device(NamedTuple):
    """What Megatron-LM reads of `torch.cuda.get_device_properties`."""

    name: str = "cpu"
    major: int = 8
    minor: int = 0
    total_memory: int = 0
    multi_processor_count: int = 1


def run_script(script: str, arguments: Sequence[str], *, fused_adam: bool = False) -> None:
    """Run one of Megatron-LM's training scripts, such as pretrain_gpt.py, on CPU tensors and gloo.

    megatron.training and the script's own imports come from the script's folder, a checkout of Megatron-LM. The
    installed megatron-core goes before the checkout's, because it has the dataset helpers compiled.

    Args:
        script: path of the script.
        arguments: of the script; `--distributed-backend gloo --transformer-impl local` and no fused kernels.
        fused_adam: as `cpu_megatron`; needed to load a checkpoint with `--use-distributed-optimizer`.

    Raises:
        MolsConfigError: there is no such script, or no megatron.training beside it.
        MolsUnsupportedError: as `cpu_megatron`, or megatron.training lacks a name that is replaced.
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
    patches = Patches()
    try:
        _patch_devices(patches)
        check_modules(LANGUAGE_MODEL)
        if importlib.util.find_spec(COMPILED) is not None:
            patches.set(importlib.import_module("megatron.core.datasets.utils"), "compile_helpers", _nothing)
        patches.set(importlib.import_module("megatron.legacy.fused_kernels"), "load", _nothing)
        training = importlib.import_module("megatron.training.training")
        without_cuda = functools.partial(training.initialize_megatron, allow_no_cuda=True)
        patches.set(training, "initialize_megatron", without_cuda)
        preparation = _without_script(multiprocessing.spawn.get_preparation_data)
        patches.set(multiprocessing.spawn, "get_preparation_data", preparation)
        logging.getLogger(NOISE).addFilter(_is_no_noise)
        yield
    finally:
        logging.getLogger(NOISE).removeFilter(_is_no_noise)
        patches.undo()


def _patch_devices(patches: Patches) -> None:
    """One device, whose memory nobody counts."""
    for name, value in {
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (_Device().major, _Device().minor),
        "get_device_properties": lambda device=None: _Device(),
        "memory_stats": lambda device=None: collections.defaultdict(int),
        "reset_peak_memory_stats": _nothing,
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "device_memory_used"), _zero),
        **dict.fromkeys(("memory_reserved", "max_memory_reserved"), _zero),
    }.items():
        patches.set(torch.cuda, name, value)


def _nothing(*args: object, **kwargs: object) -> None: ...


def _zero(*args: object, **kwargs: object) -> int:
    return 0


def _without_script(stock: Callable[[str], dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """Processes that a save of torch_dist starts do not need the script, which they would import as it is, on CUDA."""

    def get_preparation_data(name: str) -> dict[str, Any]:
        found = stock(name)
        return {key: value for key, value in found.items() if not key.startswith("init_main_from")}

    return get_preparation_data


def _is_no_noise(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 2 for a user's mistake, in one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    fused_adam = arguments[:1] == [FUSED_ADAM]
    script, *rest = arguments[fused_adam:] or [""]
    if script in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if not script or script.startswith("-"):
            raise MolsConfigError(USAGE)
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron-LM insists, and here it means nothing
        run_script(script, rest, fused_adam=fused_adam)
    except MolsConfigError as error:
        print(f"megatron_patches.cpu: {error}", file=sys.stderr)
        return 2
    return 0
