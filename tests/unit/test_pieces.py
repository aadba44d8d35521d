"""Gradients in pieces: each element in its place, NaN seen wherever it is, and no memory of a shard's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mols_ds.core import host_copies, pieces
from mols_ds.core.accumulators import Accumulators
from mols_ds.core.host_copies import HostCopies
from mols_ds.core.layout import ElementLayout
from mols_ds.core.pieces import FlatList, all_finite, flat_pieces, zero_pieces
from mols_ds.core.ranges import ShardRange
from mols_ds.core.subsample import ELEMENTS, Subsample, choose
from tests.helpers.live_bytes import LiveBytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MANY = 1 << 20


def shapes() -> Iterator[Tensor]:
    whole = torch.arange(120.0)
    yield from (whole, whole.view(12, 10), whole.view(12, 10).t(), whole.view(2, 3, 4, 5).permute(3, 1, 0, 2))
    yield from (whole[::3], whole.view(12, 10)[:, 3:7], torch.tensor(5.0), torch.zeros(0), torch.ones(1).expand(9))


@pytest.mark.parametrize("limit", [16, 64, 1 << 20])
@pytest.mark.parametrize("number", range(len(list(shapes()))))
def test_pieces_are_the_elements_in_order(number: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", limit)
    tensor = list(shapes())[number]
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel() + 1, 7):
        for numel in range(0, flat.numel() - start + 1, 5):
            found = list(flat_pieces(tensor, start, numel))
            assert torch.cat([*found, torch.zeros(0)]).equal(flat[start : start + numel])
            assert tensor.is_contiguous() or all(piece.numel() * 4 <= limit for piece in found)


def test_a_list_is_one_flat_tensor() -> None:
    tensors = [torch.randn(3, 4).t(), torch.zeros(0), torch.randn(7), torch.randn(2, 2)]
    flat, whole = FlatList(tensors), torch.cat([tensor.reshape(-1) for tensor in tensors])
    for start in range(whole.numel() + 1):
        for numel in range(whole.numel() - start + 1):
            found = list(flat.pieces(start, numel))
            assert torch.cat([*(piece for _, piece in found), torch.zeros(0)]).equal(whole[start : start + numel])
            at = 0
            for offset, piece in found:
                assert offset == at
                at += piece.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_seen_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    for numel in (1, 2, 7, 64, 1000):
        largest = torch.full((numel,), torch.finfo(dtype).max, dtype=dtype)
        largest[::2] *= -1
        assert all_finite([largest, torch.zeros(0, dtype=dtype), largest.view(numel, 1)])
        for at in {0, numel // 3, numel - 1}:
            spoiled = largest.clone()
            spoiled[at] = bad
            assert not all_finite([largest, spoiled, largest])
    assert all_finite([]) and not all_finite(iter([torch.full((3, 4), bad, dtype=dtype).t()]))


def zeros() -> Iterator[Tensor]:
    return (piece for _, piece in zero_pieces(MANY))


@pytest.mark.tier("all")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["one", "list", "zeros", "strided"])
def test_neither_pass_makes_a_tensor_of_a_shards_size(how: str, dtype: torch.dtype) -> None:
    """Of a list, `torch.cat` would make 4 bytes an element, `torch.isfinite` 5 to 7; here a chunk's scratch, 64 Ki
    elements of small pieces, and three times one sample of the kept elements."""
    whole = torch.randn(MANY).to(dtype)
    parts: dict[str, Callable[[], Any]] = {
        "one": lambda: [whole],
        "list": lambda: (piece for _, piece in FlatList(whole.split(MANY // 100)).pieces(0, MANY)),
        "zeros": zeros,
        "strided": lambda: flat_pieces(whole.view(2048, -1).t(), 0, MANY),
    }
    owned, layouts = [ShardRange("w", 0, 0, MANY)], {"w": ElementLayout.whole("vo")}
    kept = Subsample(*choose(owned, layouts, ("vo",)), torch.device("cpu"), torch.float32)
    accumulators = Accumulators(MANY, edges=[0, MANY], kept=kept)
    copies = 1 << 20 if how == "zeros" else pieces.PIECE_BYTES if how == "strided" else 0
    with LiveBytes() as check:
        assert all_finite(parts[how]())
    assert check.peak <= 4096 + 4 * copies
    with LiveBytes() as sample:
        accumulators.open()
        at = 0
        for piece in parts[how]():
            accumulators.update(at, piece)
            at += piece.numel()
        accumulators.close()
    assert sample.peak <= 4 * accumulators._chunk + 12 * ELEMENTS + (1 << 20) + 4 * copies


def test_copies_to_the_host_overlap_and_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake stream copies when it is waited for: reveals an early read, or early reuse of a buffer."""
    monkeypatch.setattr(host_copies, "CHUNK_BYTES", 64)
    under_way: list[tuple[Tensor, Tensor]] = []
    most = 0

    def begin(source: Tensor, target: Tensor) -> Callable[[], object]:
        nonlocal most
        target.fill_(-1.0)
        under_way.append((source, target))
        most = max(most, len(under_way))

        def wait() -> None:
            source, target = under_way.pop(0)
            target.copy_(source)

        return wait

    monkeypatch.setattr(host_copies, "copy_async", begin)
    copies = HostCopies()
    for dtype in (torch.float32, torch.bfloat16):
        for numel in (0, 1, 16, 17, 100, 333):
            tensor = torch.randn(numel).to(dtype)
            found = torch.zeros(numel, dtype=dtype)
            for at, chunk in copies.chunks(tensor):
                found[at : at + chunk.numel()] = chunk
            assert torch.equal(found, tensor) and not under_way
    assert most == 2 and len(copies._buffers) == 2
