"""The "optimizer" section of the main job: another name in the place of the config's, "auto" values filled in, and the
library's version where DeepSpeed's cannot run."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from mols_ds.errors import MolsConfigError, MolsWarning
from mols_ds.optim.build import offload_device, requested, zero_stage
from mols_ds.optim.catalog import CARRIED, DROPPED, OPTIMIZERS, Entry, find, known_to_deepspeed, settings_of

AUTO = "auto"
PAPER_OPTIMIZER: dict[str, Any] = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0}
"""METHOD, the paper's settings: Adam (0.9, 0.95, 1e-8) without weight decay. The base rate is tuned per model."""
DEEPSPEEDS_OWN = {
    "lamb": ("bias_correction", "eps_inside_sqrt", "max_coeff", "min_coeff", "amsgrad"),
    "lion": (),
    "muon": ("momentum", "ns_method", "muon_lr", "adam_lr", *DROPPED),
    "adam": ("bias_correction", "amsgrad", *DROPPED),
    "adamw": ("bias_correction", "amsgrad", *DROPPED),
}
"""Parameters beside CARRIED of the optimizers that DeepSpeed has itself (runtime/engine.py, 0.19)."""


def rename(section: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The section with another optimizer. Its parameters are kept where the new one has them, lr, betas, eps and
    weight_decay are dropped where it has not. Raises MolsConfigError for an unknown name, and for any other parameter
    that it lacks."""
    entry = find(name)
    if entry is None and not known_to_deepspeed(name):
        raise MolsConfigError(f"--optimizer {name} is unknown; known are {', '.join(OPTIMIZERS)}, and torch.optim's")
    given = str(section.get("type", ""))
    if given.lower() == name.lower() or (entry is not None and find(given) is entry):
        return dict(section)
    result: dict[str, Any] = {"type": name if entry is None else entry.name}
    if entry is not None and entry.name not in ("Adam", "AdamW", "Lion", "Lamb", "Muon"):
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


def _parameters(section: Mapping[str, Any], entry: Entry | None) -> tuple[str, ...]:
    """The names of the parameters that an optimizer takes."""
    name = section["type"]
    if entry is not None and (section.get("source") == "library" or not known_to_deepspeed(name)):
        return tuple(entry.settings)
    if name.lower() in DEEPSPEEDS_OWN:
        carried = [key for key in CARRIED if key != "eps" or name.lower() != "lion"]
        return (*carried, *DEEPSPEEDS_OWN[name.lower()])
    return tuple(inspect.signature(getattr(torch.optim, name, dict)).parameters)


def fill(config: dict[str, Any], lr: float | None = None) -> None:
    """Replace "auto" in the section of `config` by numbers, and choose between DeepSpeed's version and the library's.

    Raises MolsConfigError for a section without a "type", an unknown name, source or setting.
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
    adam = section["type"].lower() in ("adam", "adamw")
    for key, value in PAPER_OPTIMIZER.items():
        if params.get(key, AUTO if adam else value) == AUTO:
            params[key] = copy.copy(value)


def _where_it_runs(section: dict[str, Any], config: Mapping[str, Any]) -> None:
    """DeepSpeed's Lion, Lamb and Muon are CUDA kernels, or Muon's Adam half is: say what is taken on a CPU instead."""
    from deepspeed.accelerator import get_accelerator

    name = section["type"].lower()
    if "source" in section or name not in ("lion", "lamb", "muon") or get_accelerator().device_name() != "cpu":
        return
    if name == "lion" and offload_device(config) is not None:
        return  # DeepSpeed's CPU Lion
    if name == "muon" and zero_stage(config) > 0:
        section.setdefault("params", {}).setdefault("torch_adam", True)
        return
    entry = OPTIMIZERS[name.capitalize()]
    params = section.get("params") or {}
    section["source"] = "library"
    section["params"] = {key: value for key, value in params.items() if key in entry.settings or key not in DROPPED}
    if "eps" in section["params"] and "eps" not in entry.settings:
        del section["params"]["eps"]
    warnings.warn(
        f"DeepSpeed's {entry.name} needs a CUDA kernel and this is a CPU: {entry.name} of {entry.source} is used "
        '("source": "library")',
        MolsWarning,
        stacklevel=2,
    )
