"""Weights by logical name: those of one rank without parallelism, and a rank's part of them.

Written for the tests alone, by other means than the package's own naming: it is part of the oracle.
"""

from __future__ import annotations

import re
import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

_SCALE = 0.05


def fill(chunks: list[Any], setup: Any) -> None:
    """Give every parameter of this rank its part of the logical weight of its name."""
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in logical_names(chunk, setup).items():
                parameter.copy_(part(name, parameter, setup))


def logical_names(chunk: Any, setup: Any) -> dict[str, torch.nn.Parameter]:
    """Logical name -> parameter of one chunk: wrappers taken off, layers and experts by their global number."""
    from megatron.core import parallel_state

    first_expert = parallel_state.get_expert_model_parallel_rank() * (setup.experts // setup.ep)
    layers = {
        _bare(name): module.layer_number - 1
        for name, module in chunk.named_modules()
        if re.fullmatch(r"decoder\.layers\.\d+", _bare(name))
    }
    names = {}
    for name, parameter in chunk.named_parameters():
        name = _bare(name)
        if layer := re.match(r"decoder\.layers\.\d+", name):
            name = f"decoder.layers.{layers[layer[0]]}{name[layer.end() :]}"
        name = re.sub(r"(?<=\.local_experts\.)\d+", lambda number: str(int(number[0]) + first_expert), name)
        names[name] = parameter
    return names


def _bare(name: str) -> str:
    return re.sub(r"^(module\.)+", "", name)


def logical(name: str, shape: tuple[int, ...]) -> Tensor:
    """The float32 weight of this logical name, before any split."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    weight = torch.randn(shape, generator=generator) * _SCALE
    return weight + 1 if re.search(r"norm\.weight$", name) else weight


def part(name: str, parameter: Tensor, setup: Any) -> Tensor:
    """This rank's part of the logical weight `name`: float32, shape of `parameter`."""
    if re.search(r"\.experts\.weight[12]$", name):
        return _grouped(name, parameter, setup)
    if setup.tied and name == "output_layer.weight":  # the last stage's copy
        name = "embedding.word_embeddings.weight"
    rank, size = tensor_rank(name, parameter)
    dim = getattr(parameter, "partition_dim", 0)
    shape = list(parameter.shape)
    if size > 1:
        shape[dim] *= size
    return slice_of(name, logical(name, tuple(shape)), rank, size, dim)


def tensor_rank(name: str, parameter: Tensor) -> tuple[int, int]:
    """(rank, size) of the tensor-parallel group that splits the parameter; (0, 1) for one that is not split."""
    from megatron.core import parallel_state

    if not getattr(parameter, "tensor_model_parallel", False):
        return 0, 1
    if ".experts." in name:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def slice_of(name: str, weight: Tensor, rank: int, size: int, dim: int) -> Tensor:
    """A rank's slice; of linear_fc1, a slice of the gate and a slice of the up projection."""
    blocks = 2 if ".linear_fc1." in name else 1
    return torch.cat([block.chunk(size, dim)[rank] for block in weight.chunk(blocks, dim)], dim)


class Part(NamedTuple):
    """One rank's part of a logical parameter: the `rank`-th of `size` slices along `dim`."""

    values: Tensor
    rank: int
    size: int
    dim: int

    def of(self, name: str, whole: Tensor) -> Tensor:
        """The same slice of `whole`, a tensor of the logical shape."""
        return slice_of(name, whole, self.rank, self.size, self.dim)


def _grouped(name: str, parameter: Tensor, setup: Any) -> Tensor:
    """GroupedMLP: the transposed weights of SequentialMLP, [experts, in, out], seen as a matrix of two dimensions."""
    from megatron.core import parallel_state

    rank, size = tensor_rank(name, parameter)
    count = setup.experts // setup.ep
    first = parallel_state.get_expert_model_parallel_rank() * count
    fc1 = name.endswith("weight1")
    stem = name.removesuffix("weight1" if fc1 else "weight2") + "local_experts."
    leaf, shape = ("linear_fc1", (4, 1)) if fc1 else ("linear_fc2", (1, 2))
    experts = []
    for number in range(first, first + count):
        expert = f"{stem}{number}.{leaf}.weight"
        weight = logical(expert, (shape[0] * setup.hidden, shape[1] * setup.hidden))
        experts.append(slice_of(expert, weight, rank, size, 0 if fc1 else 1).t())
    return torch.stack(experts).view(parameter.shape)
