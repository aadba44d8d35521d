"""What cannot go with MoLS, refused by name with the way out; and what a scheduler tells about the run's length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mols_ds.core.config import MolsConfig
from mols_ds.engines.deepspeed import compat
from mols_ds.engines.deepspeed.compat import Engine
from mols_ds.errors import MolsUnsupportedError

NOT_PROPORTIONAL = dict.fromkeys(("Rprop", "ASGD", "LBFGS"), "its step is not proportional to lr")
NOT_PROPORTIONAL |= {
    "Adafactor": "torch's takes min(lr, 1/sqrt(t)) for the rate, which is not proportional to lr",
    "SGDSaI": "it sets a rate for each tensor from its gradient's signal-to-noise ratio itself",
}
NOT_PROPORTIONAL |= dict.fromkeys(("Prodigy", "DAdaptAdam", "DAdaptLion", "DAdaptSGD"), "it finds its own rate")
NOT_PROPORTIONAL |= dict.fromkeys(
    ("ScheduleFreeAdamW", "AdamWScheduleFree", "ScheduleFreeSGD", "SGDScheduleFree", "ScheduleFreeRAdam"),
    "the weights that it steps are not those that the model has",
)
"""Optimizers to which a rate per module cannot be given by their lr, with the reason."""
WHOLE_TENSORS = {
    *("Adafactor", "AdaFactor", "CAME", "SM3", "SOAP", "Shampoo", "ScalableShampoo", "PSGD", "Kron", "SPlus"),
    *("GaLore", "GaLoreAdamW", "Apollo", "APOLLO", "APOLLOAdamW", "Fira", "Conda", "Muon", "AdaMuon", "NorMuon"),
    *("DistributedMuon", "AdaGO", "MuonClip", "Scion", "Lamb", "LAMB", "FusedLamb", "LARS", "NovoGrad"),
    *("Adam_mini", "AdamMini", "SGDSaI", "Fromage", "Nero"),
}
"""Classes whose update reads whole parameters (a norm, a mean, a matrix), so that a flat shard is another optimizer."""
OTHER_MOMENTS = {"SOAP", "GaLore", "Apollo", "APOLLO", "AdaFactor", "AdamMini", "Adam_mini", "ShardedAdamMini"}
"""Classes that have two betas but no two Adam moments of each element in exp_avg and exp_avg_sq."""


def check_supported(engine: Engine, config: MolsConfig) -> None:
    """Raise `MolsUnsupportedError` for an engine or optimizer that would silently train wrong."""
    compat.check(engine)
    for refuse, what, way_out in _engine_refusals(engine, config) + _optimizer_refusals(engine, config):
        if refuse:
            raise MolsUnsupportedError(f"MoLS does not support {what}: {way_out}")


Refusal = tuple[bool, str, str]
"""Whether it applies, what is not supported, the way out."""


def _engine_refusals(engine: Engine, config: MolsConfig) -> list[Refusal]:
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
            bool(engine.config.get("sparse_gradients")),
            "sparse gradients",
            'set "sparse_gradients": false',
        ),
        (
            getattr(engine, "torch_autocast_z0_gradscaler", None) is not None,
            "torch_autocast with a gradient scaler at stage 0",
            "use ZeRO stage 1 or bf16",
        ),
        (
            not engine.managed_gradient_accumulation() and config.mode == "probe",
            '"managed_gradient_accumulation": false in mode "probe"',
            'use "mode": "online"',
        ),
        (
            config.mode == "online" and engine.zero_optimization() and not engine.zero_compute_grad_norm(),
            '"compute_grad_norm": false in mode "online" (no norm to undo clipping by and to see bad gradients with)',
            'remove it, or use "mode": "probe"',
        ),
    ]


def _optimizer_refusals(engine: Engine, config: MolsConfig) -> list[Refusal]:
    outer = engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    wrapper, name = type(outer).__name__, type(inner).__name__
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
            name in WHOLE_TENSORS and engine.zero_optimization(),
            f"{name} under ZeRO (it reads whole tensors and is given flat shards, which makes another optimizer of it)",
            'set "zero_optimization.stage": 0, or name one that sums over the shards: Lamb, AdamMini or SGG with '
            '"source": "library"',
        ),
        (
            name.startswith(("OneBit", "ZeroOneAdam")),
            f"{name} (its step communicates and freezes the variance)",
            "use Adam or AdamW",
        ),
        (name in NOT_PROPORTIONAL, f"{name} ({NOT_PROPORTIONAL.get(name)})", "use Adam, AdamW, SGD, Lion, ..."),
        (
            name == "AdaFactor" and any(_adafactor_keeps_lr(group) for group in inner.param_groups),
            "AdaFactor with relative_step or momentum (lr is not what its step is multiplied by)",
            "set relative_step=False and betas=(None, beta2)",
        ),
        (
            config.mode == "moments" and not _has_adam_moments(inner),
            f'mode "moments" with {name}, which keeps no Adam moments',
            'use "mode": "probe" or "online"',
        ),
    ]


def _adafactor_keeps_lr(group: Mapping[str, Sequence[float | None]]) -> bool:
    """Whether pytorch-optimizer's AdaFactor makes its own rate, or holds past rates in its momentum."""
    return bool(group.get("relative_step", True)) or group["betas"][0] is not None


def _has_adam_moments(inner: object) -> bool:
    if type(inner).__name__ in OTHER_MOMENTS or type(inner).__module__.startswith("bitsandbytes"):
        return False
    betas = [group.get("betas") for group in getattr(inner, "param_groups", [])]
    return "Lion" not in type(inner).__name__ and all(b is not None and len(b) == 2 for b in betas)


def scheduler_hints(scheduler: object) -> tuple[int | None, int | None]:
    """(total steps, warm-up steps) as far as the learning-rate scheduler tells them.

    Known: DeepSpeed's WarmupDecayLR and WarmupCosineLR, WarmupLR (warm-up only); torch's OneCycleLR and
    CosineAnnealingLR; transformers' LambdaLR schedules, whose steps are keywords of the lambda.
    """
    if scheduler is None:
        return None, None
    total = getattr(scheduler, "total_num_steps", None) or getattr(scheduler, "total_steps", None)
    total = total or getattr(scheduler, "T_max", None)
    warmup = getattr(scheduler, "warmup_num_steps", None)
    for function in getattr(scheduler, "lr_lambdas", None) or []:
        keywords = getattr(function, "keywords", {})
        total = total or keywords.get("num_training_steps")
        warmup = warmup if warmup is not None else keywords.get("num_warmup_steps")
    return (int(total) if total else None), (int(warmup) if warmup is not None else None)
