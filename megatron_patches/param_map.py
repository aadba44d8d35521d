"""Map local parameters to logical parameters, and select the rank that counts each.

A *logical* parameter is unsharded. Its name has global layer and expert numbers and no wrapper prefix. A shard along
dimension 0 is a contiguous flat range of it, so the layouts of fused projections do not depend on the tensor-parallel
size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from megatron_patches.group_rules import module_configs, tag_layouts
from mols_ds.core.groups import GroupTable
from mols_ds.core.layout import ElementLayout
from mols_ds.core.ranges import ParamRange
from mols_ds.errors import MolsUnsupportedError


@dataclass(frozen=True, slots=True)
class ProcessGrid:
    """Sizes of Megatron's process groups, and this rank's index in each (megatron/core/parallel_state.py).

    `data` includes context-parallel ranks: their gradients are reduced together. `expert_tensor` ranks shard one
    expert, `expert_data` ranks replicate it.
    """

    tensor: int = 1
    tensor_rank: int = 0
    pipeline: int = 1
    pipeline_rank: int = 0
    data: int = 1
    data_rank: int = 0
    expert: int = 1
    expert_rank: int = 0
    expert_tensor: int = 1
    expert_tensor_rank: int = 0
    expert_data: int = 1
    expert_data_rank: int = 0


def current_grid() -> ProcessGrid:
    """Return the grid of `megatron.core.parallel_state`. Raises `MolsUnsupportedError` before its initialisation."""
    from megatron.core import parallel_state as state

    if not state.model_parallel_is_initialized():
        raise MolsUnsupportedError(
            "megatron.core.parallel_state is not initialised, so the shards of each rank are unknown: call "
            "parallel_state.initialize_model_parallel() first (process groups that are only passed as a pg_collection "
            "are not supported)"
        )
    sizes: dict[str, int] = {}
    for kind in ("tensor_model", "pipeline_model", "data", "expert_model", "expert_tensor", "expert_data"):
        options = {"with_context_parallel": True} if kind == "data" else {}
        name = kind.removesuffix("_model")
        sizes[name] = getattr(state, f"get_{kind}_parallel_world_size")(**options)
        sizes[f"{name}_rank"] = getattr(state, f"get_{kind}_parallel_rank")(**options)
    return ProcessGrid(**sizes)


@dataclass(frozen=True, slots=True)
class LocalParameter:
    """A trainable parameter of this rank's model chunks.

    Attributes:
        parameter: the model's parameter (any dtype; only the shape of FP8 tensors is read).
        range: range of the logical parameter. It starts at 0 for a shard along another dimension than 0, whose elements
            are all in one group.
        shape: shape of the logical parameter.
        counted: whether this rank counts the parameter, among the copies on tensor- and pipeline-parallel ranks. For
            data-parallel copies see shards.py.
        expert: whether its gradient is reduced over the expert-data-parallel ranks.
        names_it: whether this rank reports the name and shape. Exactly one rank does.
    """

    parameter: nn.Parameter
    range: ParamRange
    shape: tuple[int, ...]
    counted: bool
    expert: bool
    names_it: bool

    @property
    def name(self) -> str:
        """Name of the logical parameter."""
        return self.range.name


_PREFIX = re.compile(r"^(?:module\.)+")
_LAYER = re.compile(r"^(?P<stack>.*?\blayers)\.(?P<index>\d+)(?=\.)")
_LOCAL_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)")
_TE_EXPERT = re.compile(r"(?<=\.experts\.)(?P<linear>linear_fc\d)\.(?P<leaf>weight|bias)(?P<index>\d+)$")
_GROUPED = re.compile(r"\.experts\.(?:weight[12]|linear_fc\d\.(?:weight|bias))$")
"""All experts of a rank in one tensor: GroupedMLP, and Transformer Engine's grouped linear with a single weight."""
_GROUPED_ADAPTER = re.compile(r"\.experts\.linear_fc\d\.adapter\.")
"""Megatron-Bridge's LoRA of grouped experts: 3-D weights of a rank's experts, or 2-D weights shared by all experts
(bridge/peft/utils.py, GroupedExpertLinearAdapter and ParallelLinearAdapter)."""
_EXPERT = re.compile(r"\.experts\.")


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the local shape. Under DeepSpeed's ZeRO-3 a parameter is empty and has its shape in `ds_shape`."""
    return tuple(int(size) for size in getattr(parameter, "ds_shape", parameter.shape))


def local_parameters(model_chunks: Sequence[nn.Module], grid: ProcessGrid) -> list[LocalParameter]:
    """Return this rank's trainable parameters in the order of the chunks, each once, under its first name.

    Args:
        model_chunks: this rank's part of the model, as for the optimizer.
        grid: the process groups.

    Raises:
        MolsUnsupportedError: generalised tensor parallelism (gtp): its shards differ from the TP rank's.
    """
    found: list[LocalParameter] = []
    seen: set[int] = set()
    for chunk in model_chunks:
        owners = _owners(chunk)
        layers = _layer_numbers(chunk)
        model = _innermost(chunk)
        for raw, parameter in chunk.named_parameters():
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if getattr(parameter, "is_gtp_weight_remat", False):
                raise MolsUnsupportedError(
                    f"MoLS does not support generalised tensor parallelism (parameter {raw!r}): train with gtp size 1"
                )
            name = _PREFIX.sub("", raw)
            found.append(_local(parameter, name, owners[id(parameter)], layers, model, grid))
    return found


def configs_of(model_chunks: Sequence[nn.Module]) -> dict[str, dict[str, int]]:
    """Return `module_configs` of this rank's chunks, under the logical model's module names."""
    found: dict[str, dict[str, int]] = {}
    for chunk in model_chunks:
        layers = _layer_numbers(chunk)
        found |= {_number_layers(f"{name}.", layers).rstrip("."): c for name, c in module_configs(chunk).items()}
    return found


_SHARDED_UNMARKED = ".softmax_offset"
"""Learnable softmax offsets, one per local head: sharded along dimension 0, but not marked as tensor parallel
(transformer/dot_product_attention.py)."""


def _local(
    parameter: nn.Parameter, name: str, owner: nn.Module, layers: dict[str, int], model: nn.Module, grid: ProcessGrid
) -> LocalParameter:
    expert = not getattr(parameter, "allreduce", True)
    of_expert = bool(_EXPERT.search(name))
    over_experts = expert or of_expert  # without expert parallelism, experts are in the dense buffers, sharded alike
    size, rank = (grid.expert_tensor, grid.expert_tensor_rank) if over_experts else (grid.tensor, grid.tensor_rank)
    marked = bool(getattr(parameter, "tensor_model_parallel", False)) and not _duplicated(owner, of_expert)
    sharded = marked or name.endswith(_SHARDED_UNMARKED) or _cut_magnitude(owner, name)
    shape = list(shape_of(parameter))
    adapter = _GROUPED_ADAPTER.search(name)
    grouped = bool(_GROUPED.search(name)) or (adapter is not None and len(shape) == 3)
    start = 0
    if sharded and size > 1:
        dim = int(getattr(parameter, "partition_dim", 0)) if marked else 0
        start = rank * math.prod(shape) if dim == 0 else 0
        shape[dim] *= size
    if grouped:
        shape[0] *= grid.expert
    copy = _copy_of_embedding(parameter, name, model)
    counted = not copy and (sharded or rank == 0)
    if adapter is not None and not grouped:  # one adapter for all experts, on each expert-parallel rank
        counted = counted and grid.expert_rank == 0
    replica = grid.expert_data_rank if expert else grid.data_rank
    logical = copy or _number_experts(_number_layers(name, layers), parameter, owner, grid)
    names_it = counted and rank == 0 and replica == 0 and not (grouped and grid.expert_rank)
    elements = ParamRange(logical, start, math.prod(shape_of(parameter)))
    return LocalParameter(parameter, elements, tuple(shape), counted, expert, names_it)


def _cut_magnitude(owner: nn.Module, name: str) -> bool:
    """Return whether this is Megatron-Bridge's DoRA magnitude of a column-parallel linear: sharded like the rows, but
    not marked as tensor parallel (bridge/peft/dora_layers.py)."""
    return name.endswith(".weight_magnitude") and not getattr(owner, "input_is_parallel", True)


def _duplicated(owner: nn.Module, of_expert: bool) -> bool:
    """Return whether a linear is replicated on all TP ranks. Transformer Engine marks its weight as tensor parallel.

    Replicated linears have `parallel_mode` None (`TELinear(parallel_mode="duplicated")`,
    extensions/transformer_engine.py). So do sharded experts with Megatron's own communication.
    """
    return not of_expert and hasattr(owner, "parallel_mode") and owner.parallel_mode is None


def _copy_of_embedding(parameter: nn.Parameter, name: str, model: nn.Module) -> str:
    """Return the embedding's name for the last pipeline stage's copy of a tied embedding, else "".

    With multi-token prediction that stage has its own `embedding`, and an `output_layer.weight` that is allocated but
    never used (models/gpt/gpt_model.py). It is not counted either.
    """
    embedding = "embedding.word_embeddings.weight"
    if getattr(parameter, "shared", False):
        return embedding
    tied = bool(getattr(model, "share_embeddings_and_output_weights", False))
    dead = tied and name.endswith("output_layer.weight") and not getattr(parameter, "shared_embedding", False)
    return embedding if dead else ""


def _owners(chunk: nn.Module) -> dict[int, nn.Module]:
    return {id(p): module for module in chunk.modules() for p in module._parameters.values() if p is not None}


def _innermost(chunk: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(chunk, "module", None), nn.Module):
        chunk = inner
    return chunk


def _layer_numbers(chunk: nn.Module) -> dict[str, int]:
    """Map the name of a layer module in this chunk to its index in the whole model."""
    numbers = {}
    for raw, module in chunk.named_modules():
        name = _PREFIX.sub("", raw)
        match = _LAYER.match(name + ".")
        if match is not None and match.end() == len(name) and hasattr(module, "layer_number"):
            numbers[name] = int(module.layer_number) - 1
    return numbers


def _number_layers(name: str, layers: dict[str, int]) -> str:
    match = _LAYER.match(name)
    if match is None or match["stack"].startswith("mtp"):  # all MTP layers are on the last stage
        return name
    return f"{match['stack']}.{layers.get(match.group(), int(match['index']))}{name[match.end() :]}"


def _number_experts(name: str, parameter: nn.Parameter, owner: nn.Module, grid: ProcessGrid) -> str:
    if grid.expert == 1 or not _EXPERT.search(name):
        return name
    match = _LOCAL_EXPERT.search(name) or _TE_EXPERT.search(name)
    if match is None:
        return name
    experts = _experts_of(owner, parameter)
    first = grid.expert_rank * (experts // grid.expert)
    if match.re is _LOCAL_EXPERT:
        return f"{name[: match.start()]}{first + int(match.group())}{name[match.end() :]}"
    return f"{name[: match.start()]}{match['linear']}.{match['leaf']}{first + int(match['index'])}"


def _experts_of(owner: nn.Module, parameter: nn.Parameter) -> int:
    experts = getattr(getattr(owner, "config", None), "num_moe_experts", None)
    if not experts:
        raise MolsUnsupportedError(
            f"an expert of shape {list(parameter.shape)} is in a {type(owner).__name__} whose config has no "
            "num_moe_experts: its global expert number is unknown"
        )
    return int(experts)


def local_layout(local: LocalParameter, layouts: dict[str, ElementLayout]) -> ElementLayout:
    """Return the layout of the logical parameter.

    Args:
        local: a parameter of this rank.
        layouts: name of a logical parameter -> layout.

    Raises:
        MolsUnsupportedError: a fused parameter that is not sharded by rows.
    """
    layout = layouts[local.name]
    if len(layout.groups) > 1 and shape_of(local.parameter)[1:] != local.shape[1:]:
        raise MolsUnsupportedError(
            f"parameter {local.name!r} has elements of {', '.join(layout.groups)} and is sharded along another "
            "dimension than its rows; give it one group with a rule"
        )
    return layout


@dataclass(frozen=True)
class LogicalModel:
    """The unsharded model, from the reports of all ranks.

    Attributes:
        shapes: name -> unsharded shape of the trainable parameters.
        modules: as in `configs_of`.
        frozen: names of frozen parameters, one of each kind.
    """

    shapes: dict[str, tuple[int, ...]]
    modules: Mapping[str, object] = field(default_factory=dict)
    frozen: Sequence[str] = ()

    def table(self, config: object, rules: Sequence[Sequence[str]], granularity: str) -> GroupTable:
        """Build the group table. Raises `MolsConfigError` as `tag_layouts`."""
        layouts = tag_layouts(self.shapes, config, rules, granularity, self.modules, self.frozen)  # type: ignore[arg-type]
        return GroupTable(layouts, self.shapes)
