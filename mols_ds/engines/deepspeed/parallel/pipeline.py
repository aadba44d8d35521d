"""DeepSpeed's PipelineModule (runtime/pipe/module.py), ZeRO stages 0 and 1: each stage has some of the layers.

Parameter names contain the layer number ("3.c_attn.weight") and are the same on every stage, so the names of all stages
form the logical model. A module of a `TiedLayerSpec` is on each stage that uses it, under one name
("tied_modules.embed.weight"): the first copy counts, and all get the same rate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deepspeed import comm as dist
from torch import nn

from mols_ds.core.config import MolsConfig
from mols_ds.core.group_rules import PRESETS, Rule, canonical_name, config_value, text_config
from mols_ds.core.groups import GroupTable, build_layouts
from mols_ds.core.new_weights import without_untrained
from mols_ds.engines.deepspeed.compat import PipelineEngine
from mols_ds.engines.deepspeed.parallel.base import ParallelGrid, Place, config_of, local_range, local_shape
from mols_ds.errors import MolsUnsupportedError

_LAYER = re.compile(r"^(\d+)\.")


class StageParameter(NamedTuple):
    """A stage's description of one of its trainable parameters for the others.

    kind: "embedding" for the weight of an `nn.Embedding`, "linear" for that of an `nn.Linear` which is itself a
    pipeline layer (its name gives no hint); else "".
    lr_group: index of its parameter group in the stage's optimizer; None if the optimizer does not have it.
    """

    shape: tuple[int, ...]
    kind: str
    lr_group: int | None


class PipelineGrid(ParallelGrid):
    """Pipeline and data parallelism of a PipelineModule."""

    model_parallel = True
    counts_micro_steps = False

    def __init__(self, engine: PipelineEngine) -> None:
        super().__init__(engine)
        self.group = None
        self.processes = engine.grid
        if self.processes.get_slice_parallel_world_size() > 1:
            raise MolsUnsupportedError(
                "MoLS does not support a PipelineModule whose topology has tensor slicing (axis 'model'): the part of "
                "a parameter on a rank is unknown; use pipeline and data parallelism alone"
            )
        self.world["pipeline"] = int(self.processes.get_pipe_parallel_world_size())
        self._check_world()
        self.model_parallel = self.world["pipeline"] > 1
        self.places = {
            p: Place(local_range(p, name), not getattr(p, "ds_pipe_replicated", False))
            for p, name in engine.param_names.items()
        }

    def table(self, config: MolsConfig, param_group: Mapping[str, int]) -> GroupTable:
        """As `ParallelGrid.table`. The stages exchange names and shapes once: a few bytes per parameter."""
        module = self.engine.module
        mine = _parameters(module, {p: place.range.name for p, place in self.places.items()}, param_group)
        outer = self.engine.optimizer
        groups = len(getattr(outer, "optimizer", outer).param_groups)
        records: list[Any] = [None] * self.world["pipeline"]
        record = ({name: tuple(value) for name, value in mine.items()}, _scalars(config_of(module)), groups)
        dist.all_gather_object(records, record, group=self.processes.get_pipe_parallel_group())
        every: dict[str, StageParameter] = {}
        for parameters, _, _ in records:
            for name, values in parameters.items():
                every.setdefault(name, StageParameter(*values))
        model_config = next((found for _, found, _ in records if found is not None), None)
        shapes = {name: parameter.shape for name, parameter in every.items()}
        presets = (*PRESETS, *_rules_by_type(every))
        layouts = build_layouts(shapes, model_config, config.rules, config.granularity, presets=presets)
        held = {name: p.lr_group for name, p in every.items() if p.lr_group is not None}
        # Stages whose optimizers have other groups number them differently: then each has only its own rates
        self.lr_groups = held if len({count for _, _, count in records}) == 1 else dict(param_group)
        return without_untrained(GroupTable(layouts, shapes), held, self.engine.global_rank)

    def begin_window(self) -> None:
        """Save the counter of forward passes: `seed_layers` seeds dropout by it."""
        self.window = self.engine.module.micro_offset

    def end_window(self) -> None:
        if self.window is not None:
            self.engine.module.micro_offset = self.window
            self.window = None


def _parameters(
    module: nn.Module, names: Mapping[nn.Parameter, str], param_group: Mapping[str, int]
) -> dict[str, StageParameter]:
    kinds: dict[int, str] = {}
    for name, owner in module.named_modules():
        weight = owner._parameters.get("weight")
        if weight is not None and isinstance(owner, nn.Embedding):
            kinds[id(weight)] = "embedding"
        elif weight is not None and isinstance(owner, nn.Linear) and name.isdigit():
            kinds[id(weight)] = "linear"
    return {
        name: StageParameter(local_shape(p), kinds.get(id(p), ""), param_group.get(name))
        for p, name in names.items()
        if p.requires_grad
    }


def _rules_by_type(parameters: Mapping[str, StageParameter]) -> list[Rule]:
    """Return rules by module type for names that the presets do not know: embeddings and the output head.

    The head is an `nn.Linear` that is the last layer with a weight matrix and has as many rows as an embedding.
    """
    embeddings = {name: p for name, p in parameters.items() if p.kind == "embedding"}
    rules = [_exactly(name, "embedding") for name in embeddings]
    layers = [(int(m[1]), name) for name, p in parameters.items() if len(p.shape) > 1 and (m := _LAYER.match(name))]
    last = max(layers, default=None)
    if last is not None and parameters[last[1]].kind == "linear":
        rows = {p.shape[0] for p in embeddings.values()}
        if parameters[last[1]].shape[0] in rows:
            rules.append(_exactly(last[1], "head"))
    return rules


def _exactly(name: str, group: str) -> Rule:
    return Rule(re.compile(f"^{re.escape(canonical_name(name).name)}$"), group)


def _scalars(config: object | None) -> dict[str, int | float | str | None] | None:
    """Return the config values that fused layouts read: plain numbers and strings, which stages can exchange."""
    found = text_config(config)
    if found is None:
        return None
    values: Sequence[tuple[str, Any]] = list((found if isinstance(found, Mapping) else vars(found)).items())
    kept = {key: value for key, value in values if isinstance(value, int | float | str)}
    return {**kept, "model_type": config_value(found, "model_type")}
