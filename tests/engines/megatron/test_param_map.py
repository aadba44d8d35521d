"""Where the elements of a rank's parameters are in the logical model, for parameters that Megatron marks oddly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megatron_patches.param_map import ProcessGrid, local_parameters


def chunk(heads: int, partition_dim: int | None) -> nn.Module:
    """A core attention with learnable softmax offsets, one for each of this rank's heads, and a norm beside it."""
    model = nn.Module()
    model.core_attention = nn.Module()
    model.core_attention.softmax_offset = nn.Parameter(torch.zeros(heads))
    model.norm = nn.LayerNorm(heads, bias=False)
    if partition_dim is not None:  # as Megatron's defaults mark what is not tensor parallel
        model.core_attention.softmax_offset.partition_dim = partition_dim  # type: ignore[attr-defined]
        model.core_attention.softmax_offset.tensor_model_parallel = False  # type: ignore[attr-defined]
    return model


@pytest.mark.parametrize("partition_dim", [None, -1], ids=["unmarked", "marked as not cut"])
def test_learnable_softmax_offsets_are_cut_over_the_heads(partition_dim: int | None) -> None:
    """Every tensor-parallel rank counts its own heads, and the norm is counted on the first alone."""
    for rank in range(2):
        offsets, norm = local_parameters([chunk(4, partition_dim)], ProcessGrid(tensor=2, tensor_rank=rank))
        assert offsets.name.endswith("softmax_offset")
        assert (offsets.range.start, offsets.range.numel) == (4 * rank, 4)
        assert offsets.shape == (8,) and offsets.counted
        assert norm.shape == (4,) and norm.counted == (rank == 0)


def test_without_tensor_parallelism_they_are_whole() -> None:
    (offsets, _) = local_parameters([chunk(8, None)], ProcessGrid())
    assert (offsets.range.start, offsets.range.numel, offsets.shape, offsets.counted) == (0, 8, (8,), True)


# ------------------------------------------------------------------------------------- adapters of Megatron-Bridge


def adapted(linear: str, **parameters: nn.Parameter) -> nn.Module:
    """A model whose `linear` has these parameters in its `adapter`; Megatron-Bridge itself needs Transformer Engine."""
    model = module = nn.Module()
    for name in [*linear.split("."), "adapter"]:
        module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    for name, parameter in parameters.items():
        module.register_parameter(name, parameter)
    return model


@pytest.mark.parametrize("row_parallel", [False, True])
def test_doras_magnitude_is_cut_where_the_rows_of_the_linear_are(row_parallel: bool) -> None:
    model = adapted("linear_qkv", weight_magnitude=nn.Parameter(torch.ones(12)))
    model.get_submodule("linear_qkv.adapter").input_is_parallel = row_parallel  # type: ignore[assignment]
    for rank in range(2):
        (found,) = local_parameters([model], ProcessGrid(tensor=2, tensor_rank=rank))
        if row_parallel:
            assert (found.range.start, found.shape, found.counted) == (0, (12,), rank == 0)
        else:
            assert (found.range.start, found.shape, found.counted) == (12 * rank, (24,), True)


@pytest.mark.parametrize("shared", [False, True], ids=["each expert", "all experts share"])
def test_adapters_of_grouped_experts_are_counted_once(shared: bool) -> None:
    """Two expert-parallel ranks: each has the adapters of its own experts, or both have the shared one."""
    weight = nn.Parameter(torch.zeros(4, 6) if shared else torch.zeros(3, 4, 6))
    weight.allreduce = False  # type: ignore[attr-defined]
    model = adapted("mlp.experts.linear_fc1", low_rank=weight)
    grids = [ProcessGrid(data=2, data_rank=rank, expert=2, expert_rank=rank) for rank in range(2)]
    found = [local for grid in grids for local in local_parameters([model], grid)]
    assert {local.shape for local in found} == {(4, 6) if shared else (6, 4, 6)}
    assert sum(local.range.numel for local in found if local.counted) == math.prod(found[0].shape)
    assert [local.names_it for local in found] == [True, False]
