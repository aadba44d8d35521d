"""Stand-in for the engine of a DeepSpeed config, for the checks of `mols_ds.attach`."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

from mols_ds.apps.doctor.findings import last_line
from mols_ds.core.json_types import JsonMapping
from mols_ds.errors import MolsConfigError

BUILT = {"adam": "Adam", "adamw": "AdamW", "adagrad": "Adagrad", "lamb": "FusedLamb", "lion": "FusedLion",
         "muon": "MuonWithAuxAdam", "muadam": "Adam", "muadamw": "AdamW", "musgd": "SGD"}  # fmt: skip
"""Classes that DeepSpeed builds for its own names (runtime/engine.py, _configure_basic_optimizer). Adam, AdamW and
Adagrad are torch's or kernels, depending on the config; the stand-in is torch's."""


def engine_stand_in(resolved: JsonMapping) -> SimpleNamespace:
    """Build an object with the attributes of an engine that the checks of `mols_ds.attach` read.

    Args:
        resolved: a DeepSpeed config without "auto".

    Raises:
        MolsConfigError: torch's optimizer refuses its params.
    """
    from torch import nn

    zero = resolved.get("zero_optimization") or {}
    offload = zero.get("offload_optimizer") or {}
    stage = int(zero.get("stage") or 0)
    inner = _inner(resolved)
    wrapper = "SuperOffloadOptimizer_Stage3" if offload.get("super_offload") else "DeepSpeedZeroOptimizer"
    outer = type(wrapper, (), {"optimizer": inner, "partial_offload": float(offload.get("ratio", 1.0))})()
    autocast = (resolved.get("torch_autocast") or {}).get("enabled")
    half = str((resolved.get("torch_autocast") or {}).get("dtype", "")).endswith("float16")
    return SimpleNamespace(
        optimizer=outer if stage else inner,
        module=nn.Module(),
        config=dict(resolved),
        has_moe_layers=False,
        zenflow="zenflow" in zero,
        torch_autocast_z0_gradscaler=object() if autocast and half and stage == 0 else None,
        managed_gradient_accumulation=lambda: resolved.get("managed_gradient_accumulation", True),
        zero_optimization=lambda: stage > 0,
        zero_compute_grad_norm=lambda: resolved.get("compute_grad_norm", True),
    )


def _inner(resolved: JsonMapping) -> object:
    """Build a stand-in with the class and settings of this config's optimizer. Build torch's own optimizers for real:
    they need no kernel and no package."""
    import torch

    from mols_ds.optim.build import split_config

    request = split_config(resolved)
    if request is not None:
        kind: Any = request.entry.load()
        parameters = inspect.signature(kind).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        group = {**defaults, **request.settings, **request.entry.fixed}
        return type(kind.__name__, (), {"__module__": kind.__module__, "param_groups": [group], "step": None})()
    section = resolved["optimizer"]
    params = section.get("params") or {}
    name = BUILT.get(section["type"].lower(), "")
    if not name:
        name = section["type"]
        try:
            return getattr(torch.optim, name)([torch.nn.Parameter(torch.zeros(2))], **params)
        except Exception as error:  # any type can come from where a value is used
            raise MolsConfigError(
                f'torch.optim.{name} refuses its params: {last_line(error)}; correct "optimizer.params"'
            ) from error
    group = {"weight_decay": 0.0, **({"betas": (0.9, 0.95)} if "adam" in name.lower() else {}), **params}
    if name == "Adam":  # DeepSpeed decouples its weight decay by default
        group["decoupled_weight_decay"] = params.get("adam_w_mode", True)
    module = "torch.optim" if hasattr(torch.optim, name) else "deepspeed.ops"
    return type(name, (), {"__module__": module, "param_groups": [group], "step": None})()
