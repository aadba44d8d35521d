"""Where the elements of a rank's parameters are in the logical model, for parameters that Megatron marks oddly."""

from __future__ import annotations

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
