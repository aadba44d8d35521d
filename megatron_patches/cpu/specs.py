"""Add the missing parts of megatron-core's layer specs without Transformer Engine, for `cpu.cpu_megatron`.

Patches classes in place, so that modules that imported them by name see the change.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from megatron_patches.compat import GROUPED_GEMM, TransformerConfig

_NORMS: dict[str, type[nn.Module]] = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}


def patch_specs(stack: contextlib.ExitStack) -> None:
    """Apply all patches until `stack` closes. Skip names that a release already has, or no longer has."""
    for owner, values in (*_random(), *_norm(), *_attention(), *_experts()):
        stack.enter_context(mock.patch.multiple(owner, create=True, **values))


Replaced = Iterator[tuple[ModuleType | type, dict[str, Any]]]
"""(module or class, name -> its replacement)."""


def _random() -> Replaced:
    """Patch Megatron's RNG state functions, which use CUDA's generators, and names that it defines only with TE."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    with_engine: dict[str, Any] = {
        # Selective recomputation reads it.
        "FP8GlobalStateManager": SimpleNamespace(is_fp8_enabled=lambda: False),
        "activation_recompute_forward": lambda **kwargs: contextlib.nullcontext(),
        "fp8_autocast": lambda **kwargs: contextlib.nullcontext(),
    }
    values = {name: value for name, value in with_engine.items() if not hasattr(random, name)}
    values["_get_cuda_rng_state"] = lambda *args, **kwargs: torch.get_rng_state()
    values["_set_cuda_rng_state"] = lambda state, *args, **kwargs: torch.set_rng_state(state)
    yield random, values


def _norm() -> Replaced:
    """Let `WrappedTorchNorm` accept sequence parallelism: mark its parameters, as norms of apex and TE do."""
    wrapped = importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    stock = wrapped.__new__

    def build(cls: type, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **options: Any) -> nn.Module:
        if config.normalization not in _NORMS or not config.sequence_parallel:
            return stock(cls, config, hidden_size, eps, **options)  # type: ignore[no-any-return]
        norm = _NORMS[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            # finalize_model_grads sums the gradients of marked parameters over tensor-parallel ranks
            parameter.sequence_parallel = True  # type: ignore[attr-defined]
        return norm

    yield wrapped, {"__new__": staticmethod(build)}


def _attention() -> Replaced:
    """Let core attention accept MLA's widths of K and V, as TE's does. Replace TE classes that are mocks."""
    attention = importlib.import_module("megatron.core.transformer.dot_product_attention").DotProductAttention
    stock = attention.__init__

    def init(self: Any, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kw: Any) -> None:
        stock(self, *args, **kw)
        if v_channels is not None:  # the output's width; K's is read from the tensors
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    yield attention, {"__init__": init}
    mla = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    for name in ("TEColumnParallelLinear", "TELinear"):
        if not isinstance(getattr(mla, name, None), type):  # 0.16: a MagicMock, which isinstance() refuses
            yield mla, {name: type(name, (), {})}


def _experts() -> Replaced:
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    if hasattr(dispatcher, "maybe_move_tensor_to_cpu"):
        yield dispatcher, {"maybe_move_tensor_to_cpu": _to_host}
    utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(utils, "te_general_gemm"):
        yield utils, {"te_general_gemm": None}
    if importlib.util.find_spec(GROUPED_GEMM) is None:
        return
    grouped = importlib.import_module(GROUPED_GEMM)
    if not grouped.grouped_gemm_is_available():
        there = {"grouped_gemm_is_available": lambda: True, "assert_grouped_gemm_is_available": lambda: None}
        yield grouped, {"ops": LoopedGemm, **there}


def _to_host(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
    """Replace Megatron's function of this name, which does not convert a tensor that is already on the host."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


class LoopedGemm:
    """Emulate grouped_gemm's only operation that GroupedMLP uses, as a loop over experts."""

    @staticmethod
    def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
        """Return rows of `a` times the matrix of their expert.

        Args:
            a: [tokens, k], sorted by expert.
            b: [experts, k, n], or [experts, n, k] with `trans_b`.
            batch_sizes: [experts], tokens of each expert.

        Returns:
            [tokens, n], dtype of `a`.
        """
        parts: Sequence[Tensor] = torch.split(a, batch_sizes.tolist())
        return torch.cat([x @ (w.t() if trans_b else w) for x, w in zip(parts, b, strict=True)])
