"""Build the optimizer that a DeepSpeed config names, if the catalog has it.

DeepSpeed builds the names that it has, unless the section has `"source": "library"`. Everything else in "optimizer"
is DeepSpeed's own format: "type" and "params".
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from mols_ds.core.groups import base_group, group_table, is_scaled
from mols_ds.core.json_types import JsonMapping, JsonObject
from mols_ds.errors import MolsConfigError, MolsUnsupportedError, MolsWarning
from mols_ds.optim.catalog import CLASSES, OPTIMIZERS, Entry, find, known_to_deepspeed
from mols_ds.optim.limits import check_params
from mols_ds.optim.settings import ReadSettings, Settings

Source = Literal["library", "deepspeed"]
Parameters = Iterable[torch.Tensor | Settings]
"""Tensors or parameter groups, as for torch optimizers: the users' `model_parameters`."""
NOT_MATRICES = ("embedding", "head")
"""Module groups whose 2-D weights are lookup tables, not maps between features: Adam under Muon and similar."""
OFFLOADED = ("cpu", "nvme")


@dataclass(frozen=True)
class Request:
    """An "optimizer" section that names an optimizer of the catalog, and the rest of the config for DeepSpeed.

    rules: the user's module-group rules; they also separate block matrices from lookup tables.
    """

    entry: Entry
    settings: Settings
    config: JsonObject
    rules: Sequence[Sequence[str]]


def split_config(config: JsonMapping) -> Request | None:
    """Find the catalog's optimizer in a DeepSpeed config.

    Args:
        config: a DeepSpeed config; not changed.

    Returns:
        The entry, its settings and the rest of the config; None if DeepSpeed builds the optimizer.

    Raises:
        MolsConfigError: an unknown name, "source" or setting.
        MolsUnsupportedError: the config's ZeRO stage or offload would silently make it another optimizer.
    """
    section = config.get("optimizer")
    entry = requested(section)
    if entry is None:
        _warn_of_shards(section, config)
        return None
    settings = settings_of(entry, section_of(config, "optimizer", "params"))
    kept = {key: value for key, value in config.items() if key != "optimizer"}
    _check_stage(entry, config)
    _check_offload(entry, config, kept)
    kept["zero_allow_untested_optimizer"] = True
    rules = section_of(config, "mols").get("rules") or ()
    return Request(entry, settings, kept, rules)


def requested(section: object) -> Entry | None:
    """Return the entry that an "optimizer" section names; None if DeepSpeed builds it, or refuses the section.

    Raises like `split_config`, and MolsUnsupportedError for a name that neither builds and MoLS refuses.
    """
    if not isinstance(section, Mapping) or not isinstance(section.get("type"), str):
        return None
    name, source = section["type"], section.get("source")
    if source not in (None, "library", "deepspeed"):
        raise MolsConfigError(f'"optimizer.source" is {source!r}; allowed are "library" and "deepspeed" (the default)')
    known, entry = known_to_deepspeed(name), find(name)
    if source == "deepspeed" and not known:
        raise MolsConfigError(f'"optimizer.source" is "deepspeed", which has no {name!r}; leave it out')
    if known and source != "library":
        return None
    if entry is None:
        raise unknown_name(f'"optimizer.type" {name!r}', name)
    return entry


def unknown_name(where: str, name: str) -> MolsConfigError | MolsUnsupportedError:
    """The error for an optimizer that neither DeepSpeed nor the table builds: why MoLS refuses it, where it does."""
    kind = next((one for one in CLASSES.values() if one.refused and one.name.lower() == name.lower()), None)
    if kind is not None:
        return MolsUnsupportedError(f"MoLS does not support {kind.name} ({kind.refused}): {kind.instead}")
    return MolsConfigError(f"{where} is unknown; known are {', '.join(OPTIMIZERS)}, and torch.optim's")


def settings_of(entry: Entry, params: ReadSettings) -> Settings:
    """Return the entry's settings: the user's values over the defaults. "auto" means the default.

    Raises:
        MolsConfigError: settings that this optimizer does not have (names all), or a rate, eps, decay or beta out of
            range.
    """
    unknown = [key for key in params if key not in entry.settings]
    if unknown:
        close = (difflib.get_close_matches(key, entry.settings, n=1) for key in unknown)
        meant = "".join(f' (did you mean "{near[0]}"?)' for near in close if near)
        raise MolsConfigError(
            f'"optimizer.params": {entry.name} of {entry.source} has no {", ".join(map(repr, unknown))}{meant}; '
            f"it has {', '.join(entry.settings)}"
        )
    given = {key: value for key, value in params.items() if value != "auto"}
    settings = {**entry.settings, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}}
    check_params(entry.name, settings)
    return settings


def _warn_of_shards(section: object, config: JsonMapping) -> None:
    """Warn where DeepSpeed silently gives flat shards to an optimizer that needs whole tensors."""
    name = section.get("type") if isinstance(section, Mapping) else None
    entry = find(name) if isinstance(name, str) else None
    if entry is not None and entry.cut_by_deepspeed and zero_stage(config) >= 1:
        warnings.warn(
            f"DeepSpeed gives {name} flat shards at ZeRO stage {zero_stage(config)}, but it needs whole tensors: this "
            f'run does not train with {name}. Set "zero_optimization.stage": 0, or "source": "library"',
            MolsWarning,
            stacklevel=2,
        )


def zero_stage(config: JsonMapping) -> int:
    """Return the ZeRO stage of a DeepSpeed config, by default 0. Raises MolsConfigError if it is not a number."""
    stage = section_of(config, "zero_optimization").get("stage") or 0
    try:
        return int(stage)
    except (TypeError, ValueError, OverflowError):
        raise MolsConfigError(f'"zero_optimization.stage" is {stage!r}; give 0, 1, 2 or 3') from None


def section_of(config: JsonMapping, *path: str) -> JsonMapping:
    """Return a section of a DeepSpeed config by its path; empty if absent or null. Raises MolsConfigError if it is not
    a JSON object."""
    section: Any = config
    for depth, key in enumerate(path):
        section = section.get(key)
        if section is None:
            return {}
        if not isinstance(section, Mapping):
            raise MolsConfigError(f'config: "{".".join(path[: depth + 1])}" is {section!r}; give an object, {{...}}')
    return section  # type: ignore[no-any-return]


def offload_device(config: JsonMapping) -> str | None:
    """Return the offload device of the optimizer, "cpu" or "nvme"; None without offload."""
    device = section_of(config, "zero_optimization", "offload_optimizer").get("device")
    return device if isinstance(device, str) and device in OFFLOADED else None


def _check_stage(entry: Entry, config: JsonMapping) -> None:
    stage = zero_stage(config)
    if entry.reads == "tensors" and stage >= 1:
        stock = ', or DeepSpeed\'s own on stages 1 and 2 ("source": "deepspeed")' if entry.deepspeed is not None else ""
        raise MolsUnsupportedError(
            f"optimizer {entry.name} needs whole tensors, but ZeRO stage {stage} splits them into flat shards: "
            f'set "zero_optimization.stage": 0{stock}'
        )
    parallel = section_of(config, "tensor_parallel").get("autotp_size") or 0
    if entry.reads == "tensors" and parallel not in (0, 1):
        raise MolsUnsupportedError(
            f"optimizer {entry.name} needs whole tensors, but AutoTP splits them: remove "
            '"tensor_parallel", or use an optimizer that works element by element'
        )


def _check_offload(entry: Entry, config: JsonMapping, kept: JsonObject) -> None:
    """Tell DeepSpeed that an offloaded optimizer is not its CPU Adam. Raises if the user forces that one, and for 8-bit
    state on NVMe, which DeepSpeed swaps with the size of the weights."""
    device = offload_device(config)
    if device is None:
        return
    if config.get("zero_force_ds_cpu_optimizer"):
        raise MolsUnsupportedError(
            f'optimizer {entry.name} cannot go with "zero_force_ds_cpu_optimizer": true; remove that key, '
            'or use "AdamW" without "source"'
        )
    if device == "nvme" and not entry.swappable:
        raise MolsUnsupportedError(
            f'optimizer {entry.name} cannot be offloaded to NVMe: set "offload_optimizer.device": "cpu"'
        )
    kept["zero_force_ds_cpu_optimizer"] = False


def build(request: Request, model: nn.Module, parameters: Parameters | None = None) -> torch.optim.Optimizer:
    """Build the optimizer of `request`.

    Args:
        request: from `split_config`.
        model: its trainable parameters are optimized.
        parameters: the user's `model_parameters`: tensors, or groups whose settings override the config's; None: all
            of the model's.

    Returns:
        The optimizer with the user's parameter groups.

    Raises:
        MolsConfigError: the library refuses a setting, its package is missing, or no parameter is trainable.
    """
    entry, settings = request.entry, request.settings
    groups = _parameter_groups(model, parameters)
    if not groups:
        raise MolsConfigError("the model has no trainable parameter; set requires_grad on what should be trained")
    factory = entry.load()
    arguments = dict(settings)
    if entry.split is not None:
        matrices = _matrices(model, request.rules)
        halves = entry.split(settings, hidden_size(model, matrices))
        groups = [half for group in groups for half in _halve(group, matrices, halves.matrices, halves.rest)]
        arguments = dict(halves.arguments)
    try:
        return factory(groups, **arguments, **entry.fixed)
    except Exception as error:  # pytorch-optimizer raises its own classes
        line = " ".join(str(error).split())
        raise MolsConfigError(f'"optimizer.params": {entry.name} of {entry.source} refuses them: {line}') from error


def _parameter_groups(model: nn.Module, parameters: Parameters | None) -> list[Settings]:
    """Return parameter groups in torch's format, without frozen parameters and empty groups."""
    given = list(model.parameters() if parameters is None else parameters)
    loose = [item for item in given if not isinstance(item, Mapping)]
    groups = [dict(item) for item in given if isinstance(item, Mapping)]
    groups += [{"params": loose}] if loose else []
    for group in groups:
        one = group["params"]
        group["params"] = [p for p in ([one] if isinstance(one, torch.Tensor) else one) if p.requires_grad]
    return [group for group in groups if group["params"]]


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the whole parameter, also under zero.Init."""
    return tuple(int(size) for size in getattr(parameter, "ds_shape", parameter.shape))


def _matrices(model: nn.Module, rules: Iterable[Sequence[str]]) -> set[int]:
    """Return ids of the 2-D weights of the blocks: not embedding, head or `other`. Raises MolsConfigError for weights
    without a rule, as `mols_ds.group_table` does."""
    table = group_table(model, list(rules))
    found: set[int] = set()
    stacked: list[str] = []
    for name, parameter in model.named_parameters():
        layout = table.layouts.get(name)
        if layout is None or any(not is_scaled(group) or base_group(group) in NOT_MATRICES for group in layout.groups):
            continue
        if len(_shape(parameter)) == 2:
            found.add(id(parameter))
        elif len(_shape(parameter)) > 2:
            stacked.append(name)
    if stacked:
        warnings.warn(
            f"{len(stacked)} weights of more than two dimensions ({stacked[0]}, ...) are no matrices: they get Adam",
            MolsWarning,
            stacklevel=2,
        )
    return found


def hidden_size(model: nn.Module, matrices: set[int]) -> int:
    """Return the model's width: the largest of the smaller sides of the block matrices; 0 without any."""
    return max((min(_shape(p)) for p in model.parameters() if id(p) in matrices), default=0)


def _halve(group: Settings, matrices: set[int], inside: Settings, rest: Settings) -> list[Settings]:
    """Split a user's parameter group into matrices and the rest. Omits an empty half."""
    own = {key: value for key, value in group.items() if key != "params"}
    first = [p for p in group["params"] if id(p) in matrices]
    second = [p for p in group["params"] if id(p) not in matrices]
    halves = [{**inside, **own, "params": first}, {**rest, **own, "params": second}]
    return [half for half in halves if half["params"]]
