"""Refuse engines, optimizers and settings that MoLS does not support. The message names each and says what to do."""

from __future__ import annotations

from torch import nn

from mols_ds.core.config import MolsConfig
from mols_ds.engines.deepspeed import compat
from mols_ds.engines.deepspeed.compat import Engine
from mols_ds.errors import MolsUnsupportedError
from mols_ds.optim.catalog import class_facts
from mols_ds.optim.refusals import Refusal, optimizer_refusals
from mols_ds.optim.scheduler_hints import scheduler_hints as scheduler_hints


def check_supported(engine: Engine, config: MolsConfig) -> None:
    """Raise `MolsUnsupportedError` for an engine or optimizer with which training would be silently wrong."""
    compat.check(engine)
    for refuse, what, way_out in _engine_refusals(engine, config) + _optimizer_refusals(engine, config):
        if refuse:
            raise MolsUnsupportedError(f"MoLS does not support {what}: {way_out}")


def _engine_refusals(engine: Engine, config: MolsConfig) -> list[Refusal]:
    measures = config.measures
    return [
        (
            type(engine).__name__ == "DualPipeVEngine",
            "DualPipeVEngine (each rank holds two stages)",
            "use PipelineModule with PipelineEngine",
        ),
        (type(engine).__name__ == "DeepSpeedHybridEngine", "the hybrid engine", 'set "hybrid_engine.enabled": false'),
        (
            bool(getattr(engine, "has_moe_layers", False)),
            "DeepSpeed's expert parallelism (deepspeed.moe)",
            "use a model whose experts are ordinary parameters",
        ),
        (
            getattr(engine, "is_deepcompile_enabled", bool)(),
            "DeepCompile (it reduces gradients into buffers of its own, which were not tried)",
            'set "compile.deepcompile": false; engine.compile() without it is supported',
        ),
        (
            bool(engine.config.get("sparse_gradients")),
            "sparse gradients",
            'set "sparse_gradients": false',
        ),
        (
            any(isinstance(one, nn.Embedding | nn.EmbeddingBag) and one.sparse for one in engine.module.modules()),
            "sparse gradients (an embedding with sparse=True)",
            "set sparse=False there",
        ),
        (
            getattr(engine, "torch_autocast_z0_gradscaler", None) is not None,
            "torch_autocast with a gradient scaler at stage 0",
            "use ZeRO stage 1 or bf16",
        ),
        (
            not engine.managed_gradient_accumulation() and measures == "probe",
            '"managed_gradient_accumulation": false in mode "probe"',
            'use "mode": "online"',
        ),
        (
            measures == "online" and engine.zero_optimization() and not engine.zero_compute_grad_norm(),
            '"compute_grad_norm": false in mode "online" (only the norm shows clipping and bad gradients)',
            'remove it, or use "mode": "probe"',
        ),
    ]


def _optimizer_refusals(engine: Engine, config: MolsConfig) -> list[Refusal]:
    outer = engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    wrapper, name = type(outer).__name__, type(inner).__name__
    facts = class_facts(inner)
    return [
        (
            outer is None or name == "DummyOptim",
            "an engine without an optimizer",
            'pass one, or add an "optimizer" section',
        ),
        (
            bool(getattr(engine, "zenflow", False)) or "ZenFlow" in wrapper,
            "ZenFlow (it updates a changing selection of columns outside the optimizer's step)",
            'remove "zero_optimization.zenflow"',
        ),
        (
            "SuperOffload" in wrapper,
            "SuperOffload (it steps the optimizer in other processes)",
            'set "offload_optimizer.super_offload": false',
        ),
        (
            getattr(outer, "backup_optimizer", None) is not None or getattr(outer, "partial_offload", 1.0) != 1.0,
            "offload_optimizer.ratio < 1 (a second optimizer steps the rest)",
            'set "offload_optimizer.ratio": 1.0',
        ),
        (
            type(inner).__module__.startswith("deepspeed") and "Muon" in name,
            "Muon under DeepSpeed (its gradients are already orthogonalised when they can be read)",
            'use Adam or AdamW, or the library\'s at ZeRO stage 0: "source": "library"',
        ),
        (
            facts.reads == "tensors" and engine.zero_optimization(),
            f"{name} under ZeRO (it reads whole tensors and gets flat shards, which makes it another optimizer)",
            'set "zero_optimization.stage": 0, or name one that sums over the shards: Lamb, AdamMini or SGG with '
            '"source": "library"',
        ),
        *optimizer_refusals(inner, config),
    ]


def batch_observers(engine: Engine) -> list[str]:
    """List DeepSpeed's features that see the discarded batches of a probe window on this engine."""
    return [
        what
        for on, what in (
            (engine.monitor.enabled, "the monitor writes events for each of them at the same step"),
            (engine.flops_profiler_enabled(), "the flops profiler profiles each of them at its profile step"),
            (
                engine.training_dataloader is not None and engine.curriculum_learning_enabled(),
                "the sampler of curriculum learning counts them as steps",
            ),
        )
        if on
    ]
