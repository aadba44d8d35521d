"""Trace what Megatron-core's own layers (without Transformer Engine) keep for the backward pass.

The real `GPTModel` runs forward under torch's fake tensors, as one rank of a fake tensor-parallel group. The bytes that
autograd saves are counted, each storage once. Unlike Transformer Engine's kernels, these layers keep fp32 scores and
their softmax, copies of grouped keys and values for each head, and each step of norms, rotary positions and gated MLPs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import torch
from torch import distributed as dist

from mols_ds.apps.plan.gpt import Gpt, Local
from mols_ds.apps.plan.model import saved_bytes
from mols_ds.errors import MolsConfigError, MolsUnsupportedError
from mols_ds.training.sources import one_line

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class TraceSettings(NamedTuple):
    """Sharding and input of the traced model. ffn: MLP width; 0: the config's."""

    vocab: int
    tp: int
    sp: bool
    recompute: str
    length: int
    ffn: int = 0


class Saved(NamedTuple):
    """Bytes of one micro-batch. layer: kept until its backward pass; whole: of a layer during its backward pass (with
    recomputation larger than `layer`). Outside the layers, by pipeline stage: first (embedding), last (head), between
    (neither), alone (both)."""

    layer: int
    whole: int
    first: int
    last: int
    between: int
    alone: int

    def stage(self, gpt: Gpt, stage: int) -> int:
        """Return the bytes outside the layers of a stage; with interleaved stages, of its largest chunk."""
        if gpt.pp == 1:
            return self.alone
        return self.first if stage == 0 else self.last if stage == gpt.pp - 1 else self.between


def activation_bytes(local: Local, gpt: Gpt, stage: int, tokens: int, length: int, micro_batches: int) -> int:
    """Return the peak activation bytes of one rank, over all micro-batches in flight. tokens: of one micro-batch.

    Raises:
        MolsUnsupportedError: megatron-core is not installed, or this process is part of a process group.
        MolsConfigError: Megatron refuses the model, or it cannot be traced.
    """
    saved = of(local, gpt, tokens // length, length)
    chunks = gpt.in_flight(stage, micro_batches)
    passes = math.ceil(chunks / gpt.vp)  # through the same chunk
    layers = chunks * gpt.chunk * saved.layer
    again = saved.whole - saved.layer  # the head's tensors are freed before the last layer is recomputed
    held = passes * saved.stage(gpt, stage)
    headless = passes * (saved.first if stage == 0 else saved.between) if gpt.recompute else 0
    return layers + max(held, headless + again)


def of(local: Local, gpt: Gpt, batch: int, length: int) -> Saved:
    """Compute the bytes of `batch` sequences: linear in it, so two traces suffice. Experts get an even share."""
    settings = TraceSettings(gpt.vocab, gpt.tp, gpt.sp, gpt.recompute, length)
    dense = _sequences(local, settings, batch)
    if not gpt.experts:
        return dense
    # The bytes of an MLP are linear in its width: `unit` is one unit of width for all tokens.
    narrow, wide = (_sequences(local, settings._replace(ffn=n * gpt.tp), batch) for n in (64, 128))
    unit = (wide.whole - narrow.whole) / 64
    bare = narrow.whole - 64 * unit
    size = local.config.params_dtype.itemsize
    rows = batch * length // (gpt.tp if gpt.sp else 1)
    routed = batch * length * gpt.topk / gpt.tp
    inside = routed * gpt.ffn * (unit / (batch * length) + size)  # also before the product with the router's weight
    extra = inside + routed * 2 * gpt.hidden * size * gpt.etp + rows * gpt.experts * 4 + unit * gpt.shared_ffn / gpt.tp
    whole = round(bare + extra)
    layer = dense.layer if gpt.recompute == "full" else dense.layer - dense.whole + whole
    return dense._replace(layer=layer, whole=whole)


def _sequences(local: Local, settings: TraceSettings, batch: int) -> Saved:
    one, two = (_saved(local, settings, n) for n in (1, 2))
    return Saved(*(a + (batch - 1) * (b - a) for a, b in zip(one, two, strict=True)))


@functools.lru_cache(maxsize=256)
def _saved(local: Local, settings: TraceSettings, batch: int) -> Saved:
    def ends(settings: TraceSettings, *, first: bool, last: bool, layers: int = 1) -> int:
        try:
            return _trace(local, settings, batch, layers, first=first, last=last)
        except Exception as error:  # any error of Megatron's code with fake tensors
            raise MolsConfigError(f"Megatron's layers cannot be traced: {one_line(error)}") from error

    with _fake(settings.tp):
        one = ends(settings, first=False, last=False)
        layer = ends(settings, first=False, last=False, layers=2) - one
        whole = layer
        if settings.recompute:
            plain = settings._replace(recompute="")
            whole = ends(plain, first=False, last=False, layers=2) - ends(plain, first=False, last=False)
        return Saved(
            layer,
            whole,
            ends(settings, first=True, last=False) - layer,
            ends(settings, first=False, last=True) - layer,
            one - layer,
            ends(settings, first=True, last=True) - layer,
        )


@contextlib.contextmanager
def fake_world(rank: int, ranks: int) -> Iterator[None]:
    """Make this process rank `rank` of `ranks` in `torch.distributed`, alone. The collectives of torch's backend "fake"
    return at once and leave their outputs unchanged.

    Raises MolsUnsupportedError if this process has joined a process group.
    """
    if dist.is_initialized():
        raise MolsUnsupportedError(
            "simulated ranks need a separate process, but this one has joined a process group: run "
            "python -m mols_ds.plan.simulate"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _fake(ranks: int) -> Iterator[None]:
    """Make this process rank 0 of a fake tensor-parallel group on the CPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megatron_patches.cpu.emulation import cpu_megatron

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), fake_world(0, ranks), cpu_megatron():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks, create_gloo_process_groups=False)
        try:
            plain = mock.patch.object(CudaRNGStatesTracker, "fork", lambda *_, **__: contextlib.nullcontext())
            with plain, FakeTensorMode():
                yield
        finally:
            parallel_state.destroy_model_parallel()


def _config(local: Local, settings: TraceSettings, layers: int) -> TransformerConfig:
    """Build a config of a dense model with `layers` layers on one pipeline stage. The job's own config is validated."""
    config = copy.copy(local.config)
    changes: dict[str, object] = {
        "num_layers": layers,
        "tensor_model_parallel_size": settings.tp,
        "sequence_parallel": settings.sp,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": settings.tp,
        "num_moe_experts": None,
        "perform_initialization": False,
        "use_cpu_initialization": True,
        "recompute_granularity": settings.recompute or None,
        "recompute_method": None,
        "recompute_num_layers": None,
    }
    if settings.recompute == "full":
        changes |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    elif settings.recompute:
        changes |= {"recompute_modules": config.recompute_modules or ["core_attn"]}
    if settings.ffn:
        changes |= {"ffn_hidden_size": settings.ffn}
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def _trace(local: Local, settings: TraceSettings, batch: int, layers: int, *, first: bool, last: bool) -> int:
    """Return the bytes of the distinct storages that a forward pass saves, without parameters."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    config = _config(local, settings, layers)
    dtype = config.params_dtype
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    model = GPTModel(
        config,
        spec,
        vocab_size=settings.vocab,
        max_sequence_length=settings.length,
        pre_process=first,
        post_process=last,
        position_embedding_type=local.position,
        share_embeddings_and_output_weights=local.tied,
    )
    # As Float16Module does. Parameters that are fake tensors cannot be changed in place.
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dtype != dtype:
                module.register_parameter(name, torch.nn.Parameter(parameter.detach().to(dtype)))
    ids = torch.zeros(batch, settings.length, dtype=torch.long)
    if not first:
        rows = settings.length // (settings.tp if settings.sp else 1)
        model.set_input_tensor(torch.zeros(rows, batch, config.hidden_size, dtype=dtype, requires_grad=True))
    return saved_bytes(model, lambda: model(ids, ids, None, labels=ids if last else None))
