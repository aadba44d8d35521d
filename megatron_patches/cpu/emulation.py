"""Run an unmodified megatron-core on CPU tensors and gloo, for tests and laptops.

Use `with cpu_megatron():`. Megatron-core requests CUDA by name. Inside the context

- a `TorchFunctionMode` replaces `device="cuda"` by the CPU, makes `Tensor.cuda()`, `pin_memory` and `record_stream`
  no-ops, and makes `Tensor.type()` return `torch.cuda.*Tensor`: optimizers and clipping compare that string;
- the RNG state of `torch.cuda` is the CPU's; its streams, events and ranges are no-ops;
- `@jit_fuser` (`torch.compile`) runs eagerly;
- the layer specs without Transformer Engine get their missing parts (`cpu.specs`).

On exit everything is restored. Run with 0.15.3, 0.16.1, 0.17.1, 0.18.0 and 0.19.2. Context parallelism, Transformer
Engine, FP8 and the precision-aware optimizer need a GPU.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, FunctionType, ModuleType
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_patches.compat import EMULATED, EMULATED_ADAM, TRITON, check_modules
from megatron_patches.cpu.adam import CpuFusedAdam
from megatron_patches.cpu.specs import patch_specs
from mols_ds.errors import MolsUnsupportedError

_CPU = torch.device("cpu")
_active: set[str] = set()  # patches of the contexts that are open now


@contextlib.contextmanager
def cpu_megatron(*, fused_adam: bool = False) -> Iterator[None]:
    """Run megatron-core on CPU tensors inside the `with` block. Restore everything on exit.

    A nested context adds only what the outer one lacks. Import Megatron's models inside the context: from 0.18 on they
    need triton otherwise.

    Args:
        fused_adam: build `CpuFusedAdam` instead of torch's AdamW, as if Transformer Engine were installed. Needed to
            load checkpoints of DistributedOptimizer: megatron-core asserts on the per-parameter `step` of torch's
            AdamW.

    Raises:
        MolsUnsupportedError: megatron-core is missing or lacks a patched name; or Transformer Engine or apex is
            installed, so that megatron-core would call its CUDA kernels with CPU tensors.
    """
    wanted = {"cpu"} | ({"fused_adam"} if fused_adam else set())
    new = wanted - _active
    with contextlib.ExitStack() as stack:
        if "cpu" in new:
            _check_installed()
            _patch_triton(stack)
            # Before any patch: this import sets up torch.compile, which lists torch's functions once.
            importlib.import_module("megatron.core")
            _patch_cuda(stack)
            stack.enter_context(_CpuMode())
            check_modules(EMULATED)
            patch_specs(stack)
            # Run `@jit_fuser` (`torch.compile`) eagerly: inductor fails on emulated CUDA devices.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if "fused_adam" in new:
            check_modules(EMULATED_ADAM)
            _patch_adam(stack)
        _active.update(new)
        stack.callback(_active.difference_update, new)
        yield


def _check_installed() -> None:
    if not _found("megatron") or not _found("megatron.core"):
        raise MolsUnsupportedError(
            "megatron-core is not installed, so cpu_megatron() has nothing to run: pip install 'megatron-core>=0.16'"
        )
    for module, product in (("transformer_engine", "Transformer Engine"), ("amp_C", "NVIDIA apex")):
        if _found(module):
            raise MolsUnsupportedError(
                f"{product} (module {module}) is installed: megatron-core would call its CUDA kernels with CPU tensors."
                " Run on the GPU without cpu_megatron(), or use an environment without it"
            )


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _patch_adam(stack: contextlib.ExitStack) -> None:
    """Patch the places where Megatron selects the Adam class and its state layout."""
    optimizer, distributed = EMULATED_ADAM
    stack.enter_context(mock.patch.multiple(optimizer, Adam=CpuFusedAdam, USING_PYTORCH_OPTIMIZER=False))
    found = mock.patch.multiple(distributed, Adam=CpuFusedAdam, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True)
    stack.enter_context(found)


# --- torch ----------------------------------------------------------------------------------------------------------


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _CpuMode(TorchFunctionMode):
    """Redirect CUDA calls to the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cuda or func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.record_stream:
            return None
        if func is Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


class _Event:
    """A CUDA event that is always complete."""

    def _ignore(self, *args: Any, **kwargs: Any) -> None: ...

    __init__ = record = wait = synchronize = _ignore

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: object) -> float:
        return 0.0


class _Stream(contextlib.AbstractContextManager[None]):
    """A CUDA stream whose work is always complete."""

    device = _CPU
    cuda_stream = 0

    def _ignore(self, *args: Any, **kwargs: Any) -> None: ...

    __init__ = __exit__ = wait_event = wait_stream = synchronize = _ignore

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True


def _nothing() -> Callable[..., None]:
    """Return a new no-op function: torch.compile rejects one function under two names of torch."""

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    return nothing


def _patch_cuda(stack: contextlib.ExitStack) -> None:
    """Patch the functions of `torch.cuda` that megatron-core calls in training."""
    stream = _Stream()
    random: dict[str, Any] = {
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    }
    training: dict[str, Any] = {
        # A device, not an index: torch interprets an index as a CUDA device.
        "current_device": lambda: _CPU,
        "is_initialized": lambda: True,
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "current_stream": lambda *args, **kwargs: stream,
        "default_stream": lambda *args, **kwargs: stream,
        "stream": lambda stream=None: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
        "synchronize": _nothing(),
        "empty_cache": _nothing(),
        "set_device": _nothing(),
    }
    stack.enter_context(mock.patch.multiple(torch.cuda, **random, **training))
    stack.enter_context(mock.patch.multiple(torch.cuda.random, **random))
    stack.enter_context(mock.patch.multiple(torch.cuda.nvtx, range_push=_nothing(), range_pop=_nothing()))


# --- triton ---------------------------------------------------------------------------------------------------------


class _NoKernel:
    """Placeholder of a triton kernel without triton: raises when launched."""

    def __init__(self, function: FunctionType) -> None:
        self.name = function.__qualname__

    def __getitem__(self, grid: object) -> NoReturn:
        raise MolsUnsupportedError(
            f"the kernel {self.name} needs a GPU and triton, which is not installed: remove the option that uses it"
            " (moe_paged_stash, --batch-invariant-mode)"
        )


def _jit(function: FunctionType | None = None, **options: object) -> Any:
    """Emulate `@triton.jit` and `@triton.jit(...)`."""
    return _NoKernel if function is None else _NoKernel(function)


class _WithoutTriton(SourceFileLoader):
    """Load a module without its `import triton`. Its kernels raise when launched."""

    def source_to_code(self, data: Any, path: Any, **options: Any) -> CodeType:  # type: ignore[override]
        tree = ast.parse(data, path)
        tree.body = [n for n in tree.body if not (isinstance(n, ast.Import) and n.names[0].name.startswith("triton"))]
        return compile(tree, path, "exec", dont_inherit=True)

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)  # not the cached bytecode of the unmodified module

    def exec_module(self, module: ModuleType) -> None:
        language = ModuleType("triton.language")
        vars(language)["constexpr"] = object
        triton = ModuleType("triton")
        vars(triton).update(jit=_jit, language=language)
        vars(module).update(triton=triton, tl=language)
        super().exec_module(module)


class _TritonFinder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        if fullname not in TRITON:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.origin is not None:
            spec.loader = _WithoutTriton(fullname, spec.origin)
        return spec


def _patch_triton(stack: contextlib.ExitStack) -> None:
    if not _found("triton"):
        finder = _TritonFinder()
        sys.meta_path.insert(0, finder)
        stack.callback(sys.meta_path.remove, finder)
