"""Builds the optimizer that a DeepSpeed config names, where it is one of this package's table.

A name that stock DeepSpeed builds itself stays DeepSpeed's, unless the section asks for the table's with
`"source": "library"`. Everything else in "optimizer" is DeepSpeed's own format: "type" and "params".
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from mols_ds.core.groups import base_group, group_table, is_scaled
from mols_ds.errors import MolsConfigError, MolsUnsupportedError, MolsWarning
from mols_ds.optim.catalog import CLASSES, OPTIMIZERS, Entry, find, known_to_deepspeed
from mols_ds.optim.limits import setting_problem
from mols_ds.optim.settings import EditedSection, ReadSettings, Section, Settings

Source = Literal["library", "deepspeed"]
Parameters = Iterable[torch.Tensor | Settings]
"""Tensors, or parameter groups as torch takes them: what users pass as `model_parameters`."""
NOT_MATRICES = ("embedding", "head")
"""Module groups whose 2-D weights are tables of tokens, not maps between features: Adam's half of Muon and its kin."""
OFFLOADED = ("cpu", "nvme")


@dataclass(frozen=True)
class Request:
    """An "optimizer" section that names an optimizer of the table, and the rest of the config, for DeepSpeed.

    rules: the user's module-group rules, which also tell the matrices of the blocks from tables of tokens.
    """

    entry: Entry
    settings: Settings
    config: EditedSection
    rules: Sequence[Sequence[str]]


def split_config(config: Section) -> Request | None:
    """The optimizer of the table that a DeepSpeed config names.

    Args:
        config: a DeepSpeed config; it is not changed.

    Returns:
        The entry, its settings and the rest of the config; None where DeepSpeed builds the optimizer.

    Raises:
        MolsConfigError: a name that neither knows, an unknown "source" or setting.
        MolsUnsupportedError: the config's ZeRO stage or offload would silently turn it into another optimizer.
    """
    section = config.get("optimizer")
    if not isinstance(section, Mapping) or not isinstance(section.get("type"), str):
        return None  # DeepSpeed's to accept or refuse
    entry = requested(section)
    if entry is None:
        _warn_of_shards(section["type"], config)
        return None
    settings = settings_of(entry, section_of(config, "optimizer", "params"))
    kept = {key: value for key, value in config.items() if key != "optimizer"}
    _check_stage(entry, config)
    _check_offload(entry, config, kept)
    kept["zero_allow_untested_optimizer"] = True
    rules = section_of(config, "mols").get("rules") or ()
    return Request(entry, settings, kept, rules)


def requested(section: Section) -> Entry | None:
    """The entry that an "optimizer" section asks for; None where DeepSpeed builds it. Errors as `split_config`, and
    MolsUnsupportedError for a name that neither builds and MoLS refuses."""
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
    """The entry's settings: the user's values, else the defaults. "auto" means the default.

    Raises:
        MolsConfigError: a setting that this optimizer does not have (all are named), or a rate, eps, decay or beta out
            of range.
    """
    unknown = [key for key in params if key not in entry.settings]
    if unknown:
        raise MolsConfigError(
            f'"optimizer.params": {entry.name} of {entry.source} has no {", ".join(map(repr, unknown))}; '
            f"it has {', '.join(entry.settings)}"
        )
    given = {key: value for key, value in params.items() if value != "auto"}
    settings = {**entry.settings, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}}
    _check_ranges(entry.name, settings)
    return settings


def _check_ranges(name: str, settings: ReadSettings) -> None:
    """Raise MolsConfigError for a setting whose value cannot be. name: of the optimizer."""
    problem = setting_problem(settings)
    if problem is not None:
        key, allowed = problem
        raise MolsConfigError(f'"optimizer.params.{key}" of {name} is {settings[key]!r}: give {allowed}')


def _warn_of_shards(name: str, config: Section) -> None:
    """DeepSpeed hands flat shards to optimizers that need whole tensors, without a word. It stays what it is."""
    entry = find(name)
    if entry is not None and entry.cut_by_deepspeed and zero_stage(config) >= 1:
        warnings.warn(
            f"DeepSpeed hands {name} flat shards at ZeRO stage {zero_stage(config)}, and it reads whole tensors: what "
            f'is trained with is not {name}. Set "zero_optimization.stage": 0, or "source": "library"',
            MolsWarning,
            stacklevel=2,
        )


def zero_stage(config: Section) -> int:
    """The ZeRO stage of a DeepSpeed config; 0 where none is given. Raises MolsConfigError where it is no number."""
    stage = section_of(config, "zero_optimization").get("stage") or 0
    try:
        return int(stage)
    except (TypeError, ValueError, OverflowError):
        raise MolsConfigError(f'"zero_optimization.stage" is {stage!r}; give 0, 1, 2 or 3') from None


def section_of(config: Section, *path: str) -> Section:
    """A section of a DeepSpeed config by its path, empty where it is absent or null. Raises MolsConfigError for one
    that is no JSON object."""
    section: Any = config
    for depth, key in enumerate(path):
        section = section.get(key)
        if section is None:
            return {}
        if not isinstance(section, Mapping):
            raise MolsConfigError(f'config: "{".".join(path[: depth + 1])}" is {section!r}; give an object, {{...}}')
    return section  # type: ignore[no-any-return]


def offload_device(config: Section) -> str | None:
    """Where the optimizer is offloaded to, "cpu" or "nvme"; None where it is not."""
    device = section_of(config, "zero_optimization", "offload_optimizer").get("device")
    return device if isinstance(device, str) and device in OFFLOADED else None


def _check_stage(entry: Entry, config: Section) -> None:
    stage = zero_stage(config)
    if entry.reads == "tensors" and stage >= 1:
        stock = ', or DeepSpeed\'s own on stages 1 and 2 ("source": "deepspeed")' if entry.deepspeed is not None else ""
        raise MolsUnsupportedError(
            f"optimizer {entry.name} works on whole tensors and ZeRO stage {stage} cuts them into flat shards: "
            f'set "zero_optimization.stage": 0{stock}'
        )
    parallel = section_of(config, "tensor_parallel").get("autotp_size") or 0
    if entry.reads == "tensors" and parallel not in (0, 1):
        raise MolsUnsupportedError(
            f"optimizer {entry.name} works on whole tensors and AutoTP cuts them: remove "
            '"tensor_parallel", or use an optimizer that works element by element'
        )


def _check_offload(entry: Entry, config: Section, kept: EditedSection) -> None:
    """Tells DeepSpeed that an offloaded optimizer is not its CPU Adam. Raises where the user forces that one, and for
    8-bit state on NVMe, which DeepSpeed swaps as numbers of the weights' size."""
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
    """Builds the optimizer of `request`.

    Args:
        request: from `split_config`.
        model: its trainable parameters are optimized.
        parameters: what the user passed as `model_parameters` (tensors, or groups whose own settings override those of
            the config); None: all of the model's.

    Returns:
        The optimizer, with the user's parameter groups.

    Raises:
        MolsConfigError: the library refuses a setting, its package is missing, or nothing is trainable.
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
    except Exception as error:  # pytorch-optimizer's are of its own kind
        line = " ".join(str(error).split())
        raise MolsConfigError(f'"optimizer.params": {entry.name} of {entry.source} refuses them: {line}') from error


def _parameter_groups(model: nn.Module, parameters: Parameters | None) -> list[Settings]:
    """Parameter groups as torch takes them, without frozen parameters and without empty groups."""
    given = list(model.parameters() if parameters is None else parameters)
    loose = [item for item in given if not isinstance(item, Mapping)]
    groups = [dict(item) for item in given if isinstance(item, Mapping)]
    groups += [{"params": loose}] if loose else []
    for group in groups:
        one = group["params"]
        group["params"] = [p for p in ([one] if isinstance(one, torch.Tensor) else one) if p.requires_grad]
    return [group for group in groups if group["params"]]


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The whole parameter's shape, also under zero.Init."""
    return tuple(int(size) for size in getattr(parameter, "ds_shape", parameter.shape))


def _matrices(model: nn.Module, rules: Iterable[Sequence[str]]) -> set[int]:
    """ids of the 2-D weights of the blocks: neither embedding, head nor `other`. Raises MolsConfigError as
    `mols_ds.group_table` for weights that no rule knows."""
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
    """The largest of the smaller sides of the blocks' matrices: the model's width. 0 without any."""
    return max((min(_shape(p)) for p in model.parameters() if id(p) in matrices), default=0)


def _halve(group: Settings, matrices: set[int], inside: Settings, rest: Settings) -> list[Settings]:
    """A user's parameter group as one of matrices and one of the rest, whichever is not empty."""
    own = {key: value for key, value in group.items() if key != "params"}
    first = [p for p in group["params"] if id(p) in matrices]
    second = [p for p in group["params"] if id(p) not in matrices]
    halves = [{**inside, **own, "params": first}, {**rest, **own, "params": second}]
    return [half for half in halves if half["params"]]
