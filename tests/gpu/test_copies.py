"""Gradients on a GPU with accumulators on the host, and the pass that sees NaN: bits as on the CPU, memory bounded.

Not run when it was written: there was no GPU. Needs CUDA alone, no Transformer Engine.
"""

from __future__ import annotations

import pytest
import torch

from mols_ds.core.accumulators import Accumulators
from mols_ds.core.host_copies import CHUNK_BYTES, HostCopies
from mols_ds.core.pieces import all_finite

pytestmark = [pytest.mark.tier("all")]
NUMEL = (1 << 26) + 12345


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_have_the_bits_and_overlap(dtype: torch.dtype) -> None:
    gradient = torch.randn(NUMEL, device="cuda").to(dtype)
    copies, found = HostCopies(), torch.zeros(NUMEL, dtype=dtype)
    for at, chunk in copies.chunks(gradient):
        found[at : at + chunk.numel()] = chunk
    assert torch.equal(found, gradient.cpu())
    assert all(buffer.is_pinned() and buffer.numel() == CHUNK_BYTES for buffer in copies._buffers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_takes_nothing_of_the_shards_size(dtype: torch.dtype) -> None:
    samples = [torch.randn(NUMEL, device="cuda").to(dtype) for _ in range(3)]
    here, there = Accumulators(NUMEL), Accumulators(NUMEL)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for sample in samples:
        assert all_finite([sample])
        there.open()
        there.update(0, sample, 0.5)
        there.close()
    assert torch.cuda.max_memory_allocated() - before <= 64 * 2**20
    for sample in samples:
        here.open()
        here.update(0, sample.cpu(), 0.5)
        here.close()
    assert torch.equal(here.mean, there.mean) and torch.equal(here.m2, there.m2)
    samples[0][NUMEL - 1] = torch.nan
    assert not all_finite([samples[0]])
