"""Add the missing parts of megatron-core's layer specs without Transformer Engine, for `cpu.cpu_megatron`.

Patches classes in place, so that modules that imported them by name see the change.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from megatron_patches.compat import GROUPED_GEMM, TransformerConfig
from megatron_patches.monkeypatch import Patches

_NORMS: dict[str, type[nn.Module]] = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}


def patch_specs(patches: Patches) -> None:
    """Apply all patches. Skip names that a release already has, or no longer has."""
    _patch_random(patches)
    _patch_norm(patches)
    _patch_attention(patches)
    _patch_experts(patches)


def _optional(name: str) -> ModuleType | None:
    return importlib.import_module(name) if importlib.util.find_spec(name) is not None else None


def _patch_random(patches: Patches) -> None:
    """Patch Megatron's RNG state functions, which use CUDA's generators, and names that it defines only with TE."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    patches.set(random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    patches.set(random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
    for name, value in {
        "FP8GlobalStateManager": _NoFp8,
        "activation_recompute_forward": lambda **kwargs: contextlib.nullcontext(),
        "fp8_autocast": lambda **kwargs: contextlib.nullcontext(),
    }.items():
        if not hasattr(random, name):
            patches.set(random, name, value)


class _NoFp8:
    """Transformer Engine's FP8 state, always off. Selective recomputation reads it."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _patch_norm(patches: Patches) -> None:
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

    patches.set(wrapped, "__new__", staticmethod(build))


def _patch_attention(patches: Patches) -> None:
    """Let core attention accept MLA's widths of K and V, as TE's does. Replace TE classes that are mocks."""
    attention = importlib.import_module("megatron.core.transformer.dot_product_attention").DotProductAttention
    stock = attention.__init__

    def init(self: Any, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kw: Any) -> None:
        stock(self, *args, **kw)
        if v_channels is not None:  # the output's width; K's is read from the tensors
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    patches.set(attention, "__init__", init)
    mla = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    for name in ("TEColumnParallelLinear", "TELinear"):
        if not isinstance(getattr(mla, name, None), type):  # 0.16: a MagicMock, which isinstance() refuses
            patches.set(mla, name, type(name, (), {}))


def _patch_experts(patches: Patches) -> None:
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    if hasattr(dispatcher, "maybe_move_tensor_to_cpu"):
        patches.set(dispatcher, "maybe_move_tensor_to_cpu", _to_host)
    utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(utils, "te_general_gemm"):
        patches.set(utils, "te_general_gemm", None)
    grouped = _optional(GROUPED_GEMM)
    if grouped is not None and not grouped.grouped_gemm_is_available():
        patches.set(grouped, "ops", LoopedGemm)
        patches.set(grouped, "grouped_gemm_is_available", lambda: True)
        patches.set(grouped, "assert_grouped_gemm_is_available", lambda: None)


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
