"""Edit the "optimizer" section of a training job: replace the name, fill "auto" values, use the library's version where
DeepSpeed's cannot run."""

from __future__ import annotations

import copy
import inspect
import warnings

import torch

from mols_ds.core.json_types import JsonMapping, JsonObject
from mols_ds.core.validation import suggestion
from mols_ds.errors import MolsConfigError, MolsWarning
from mols_ds.optim.build import offload_device, requested, settings_of, unknown_name, zero_stage
from mols_ds.optim.catalog import Entry, find, known_to_deepspeed
from mols_ds.optim.limits import check_params
from mols_ds.optim.settings import ADAM, CARRIED, DROPPED

AUTO = "auto"
PAPER_OPTIMIZER: JsonMapping = {**ADAM, "betas": list(ADAM["betas"])}
"""The paper's settings (METHOD.md): Adam (0.9, 0.95, 1e-8) without weight decay. The base rate is tuned per model."""


def rename(section: JsonMapping, name: str) -> JsonObject:
    """Return the section with another optimizer. Keeps the parameters that the new one has.

    Drops lr, betas, eps and weight_decay where the new one lacks them.

    Raises:
        MolsConfigError: an unknown name, or another parameter that the new one lacks.
    """
    entry = find(name)
    if entry is None and not known_to_deepspeed(name):
        raise unknown_name(f"--optimizer {name}", name)
    given = str(section.get("type", ""))
    if given.lower() == name.lower() or (entry is not None and find(given) is entry):
        return dict(section)
    result: JsonObject = {"type": name if entry is None else entry.name}
    if entry is not None and entry.deepspeed is None:
        result["source"] = "library"
    own = _parameters(result, entry)
    params = section.get("params") or {}
    lost = [key for key in params if key not in own and key not in (*CARRIED, *DROPPED)]
    if lost:
        raise MolsConfigError(
            f"--optimizer {name} has no {', '.join(map(repr, lost))}, which the config gives to {given}; it has "
            f"{', '.join(own)}"
        )
    result["params"] = {key: copy.copy(value) for key, value in params.items() if key in own}
    return result


def _parameters(section: JsonMapping, entry: Entry | None) -> tuple[str, ...]:
    """Return the parameter names of an optimizer; empty if they are not known here."""
    name = section["type"]
    if entry is not None and (section.get("source") == "library" or not known_to_deepspeed(name)):
        return tuple(entry.settings)
    if entry is not None and entry.deepspeed is not None:
        return entry.deepspeed.parameters
    kind = getattr(torch.optim, name, None)  # None: DeepSpeed's own, or unknown
    return () if kind is None else tuple(key for key in inspect.signature(kind).parameters if key != "params")


def fill(config: JsonObject, lr: float | None = None) -> None:
    """Replace "auto" in the "optimizer" section of `config` by numbers, and choose DeepSpeed's or the library's
    version.

    Raises:
        MolsConfigError: no "type", or an unknown name, source or setting.
    """
    section = config["optimizer"]
    if not isinstance(section, dict) or not isinstance(section.get("type"), str):
        raise MolsConfigError('config: "optimizer" needs a "type", such as "AdamW"')
    if section.get("params") is None:
        section["params"] = {}
    if not isinstance(section["params"], dict):
        raise MolsConfigError(f'config: "optimizer.params" is {section["params"]!r}; give an object, {{...}}')
    _where_it_runs(section, config)
    params = section["params"]
    if lr is not None:
        params["lr"] = lr
    entry = requested(section)
    if entry is not None:
        section["type"] = entry.name
        section["params"] = settings_of(entry, params)
        return
    _check_stock(section)
    adam = section["type"].lower() in ("adam", "adamw")
    for key, value in PAPER_OPTIMIZER.items():
        if params.get(key, AUTO if adam else value) == AUTO:
            params[key] = copy.copy(value)


def _check_stock(section: JsonMapping) -> None:
    """Check the parameters of an optimizer that DeepSpeed builds, which would raise a TypeError there.

    Raises:
        MolsConfigError: an unknown name, or a value out of range.
    """
    name, params = section["type"], section["params"]
    known = _parameters(section, find(name))
    wrong = [key for key in params if known and key not in (*known, *DROPPED)]
    if wrong:
        raise MolsConfigError(f'"optimizer.params.{wrong[0]}" of {name}: unknown key; {suggestion(wrong[0], known)}')
    check_params(name, {key: value for key, value in params.items() if value != AUTO})


def _where_it_runs(section: JsonObject, config: JsonMapping) -> None:
    """On a CPU, use the library's version if DeepSpeed's needs a CUDA kernel. Warns."""
    from deepspeed.accelerator import get_accelerator

    entry = find(section["type"]) if known_to_deepspeed(section["type"]) else None
    if "source" in section or entry is None or entry.deepspeed is None or get_accelerator().device_name() != "cpu":
        return
    on_cpu = entry.deepspeed.on_cpu
    if on_cpu == "always" or (on_cpu == "offloaded" and offload_device(config) is not None):
        return
    if on_cpu == "sharded" and zero_stage(config) > 0:
        section.setdefault("params", {}).setdefault("torch_adam", True)
        return
    params = section.get("params") or {}
    section["source"] = "library"
    section["params"] = {key: value for key, value in params.items() if key in entry.settings or key not in DROPPED}
    if "eps" in section["params"] and "eps" not in entry.settings:
        del section["params"]["eps"]
    warnings.warn(
        f"DeepSpeed's {entry.name} needs a CUDA kernel and this is a CPU: using {entry.name} of {entry.source} "
        '("source": "library")',
        MolsWarning,
        stacklevel=2,
    )
