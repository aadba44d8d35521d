"""Streaming moments against stacked float64 statistics, fed the same (rounded) gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mols_ds.core import accumulators as moments_module
from mols_ds.core.accumulators import Accumulators
from mols_ds.core.columns import BLOCK, BLOCK_COLUMN
from mols_ds.core.sample_blocks import STRIDE, SampleBlocks, subsample
from mols_ds.core.subsample import CELLS, Subsample
from mols_ds.errors import MolsCheckpointError, MolsConfigError, MolsError


def feed(moments: Accumulators, gradient: Tensor, cuts: tuple[int, ...] = (), scale: float = 1.0) -> None:
    """One sample, in pieces at these cuts."""
    edges = [0, *cuts, gradient.numel()]
    moments.open()
    for start, end in pairwise(edges):
        moments.update(start, gradient[start:end], scale)
    moments.close()


def with_blocks(n: int, groups: int = 1, index: Tensor | None = None) -> Accumulators:
    """As release 0.4.0 made them."""
    if index is None:
        index = torch.zeros(subsample(0, n)[2], dtype=torch.uint8)
    return Accumulators(n, kept=SampleBlocks(n, index, groups, torch.device("cpu"), torch.float32))


def with_samples(n: int, every: int = 3) -> Accumulators:
    """All samples of every third element are kept."""
    places = torch.arange(0, n, every)
    kept = Subsample(places, torch.zeros_like(places, dtype=torch.int16), [every], torch.device("cpu"), torch.float32)
    return Accumulators(n, kept=kept)


def gradients(k: int, n: int, seed: int = 0) -> Tensor:
    """(k, n) fp32 with means of the size of the noise, and sizes that differ by 12 orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** (12 * torch.rand(n, generator=generator) - 9)
    return size * (torch.randn(n, generator=generator) + torch.randn(k, n, generator=generator))


def check(moments: Accumulators, samples: Tensor) -> None:
    """Error bounds: Welford in fp32 errs by a few K * 6e-8 of the standard deviation, seen here far below 1e-5."""
    exact = samples.double()
    k = exact.shape[0]
    deviation = exact.var(0).sqrt() + exact.mean(0).abs()
    assert moments.count == k
    assert ((moments.mean - exact.mean(0)).abs() <= 2e-6 * deviation).all()
    assert ((moments.m2 / (k - 1) - exact.var(0)).abs() <= 5e-6 * deviation**2).all()


@settings(max_examples=25)
@given(
    k=st.integers(2, 40),
    n=st.integers(1, 700),
    cut=st.floats(0, 1),
    chunk=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_equals_stacked_statistics(k: int, n: int, cut: float, chunk: int, dtype: torch.dtype) -> None:
    samples = gradients(k, n).clamp(-6e4, 6e4).to(dtype)
    moments = Accumulators(n)
    moments._chunk = chunk  # several chunks, the last one shorter
    for sample in samples:
        feed(moments, sample, (int(cut * n),))
    check(moments, samples.float())


def test_several_real_chunks() -> None:
    n = 2 * moments_module.CPU_CHUNK + 12345
    samples = gradients(4, n)
    moments = Accumulators(n)
    for sample in samples:
        feed(moments, sample, (STRIDE, 99_991))
    check(moments, samples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1 / 65536, 1 / 3])
def test_strided_scaled_input_is_left_alone(dtype: torch.dtype, scale: float) -> None:
    samples = (torch.randn(6, 501, 3, generator=torch.Generator().manual_seed(1)) * 100).to(dtype)
    kept = samples.clone()
    moments = Accumulators(501)
    for sample in samples:
        feed(moments, sample[:, 1], (250,), scale)
    assert torch.equal(samples, kept)
    # The product is made in fp32, never in 16 bits, which would err by 4e-3.
    check(moments, samples[:, :, 1].float() * scale)


@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_zero_and_constant_elements_are_exact(scale: float) -> None:
    moments = Accumulators(100)
    gradient = torch.linspace(-7, 7, 100)
    gradient[:40] = 0
    for _ in range(17):
        feed(moments, gradient, (), scale)
    assert not moments.m2.any()
    assert torch.equal(moments.mean, gradient * scale)


def test_large_offset_keeps_the_variance() -> None:
    """Sum of squares minus square of sum would lose everything here: mean 1e4, standard deviation 1."""
    samples = 1e4 + torch.randn(32, 1000, generator=torch.Generator().manual_seed(2))
    moments = Accumulators(1000)
    for sample in samples:
        feed(moments, sample)
    # One ulp of 1e4 is 1e-3: each deviation is known to 1e-3 of the standard deviation, the variance of 32 to a few.
    torch.testing.assert_close(moments.m2.double() / 31, samples.double().var(0), rtol=5e-3, atol=0)


def test_pieces_may_come_in_any_order_and_change() -> None:
    samples = gradients(9, 1000)
    one, other = Accumulators(1000), Accumulators(1000)
    for number, sample in enumerate(samples):
        feed(one, sample)
        other.open()
        cut = 100 * number + 1
        other.update(cut, sample[cut:])
        other.update(cut, sample[cut:cut])
        other.update(0, sample[:cut])
        other.close()
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.m2, other.m2)


def test_subsample_visits_multiples_of_the_stride() -> None:
    for offset in (0, 1, 126, 127, 128, 1000):
        for numel in (0, 1, 126, 127, 128, 500):
            first, index, n = subsample(offset, numel)
            wanted = [i for i in range(offset, offset + numel) if i % STRIDE == 0]
            assert [offset + first + STRIDE * j for j in range(n)] == wanted
            assert not wanted or index == wanted[0] // STRIDE


def test_block_sums_equal_those_of_the_blocks_alone() -> None:
    n, length = 2000, BLOCK
    samples = torch.randn(3 * BLOCK + 2, n, generator=torch.Generator().manual_seed(3)) + 0.5
    samples[:, 10 * STRIDE] = 0  # an element that never moves is in no sum
    size = subsample(0, n)[2]
    index = (torch.arange(size) % 3).to(torch.int16)
    moments = with_blocks(n, 4, index)
    for sample in samples.to(torch.bfloat16):
        feed(moments, sample, (1, 127, 128, 1500), 0.25)
    assert isinstance(moments.kept, SampleBlocks) and len(moments.kept.sums) == 3
    exact = samples.to(torch.bfloat16).double()[:, ::STRIDE] * 0.25
    for number, table in enumerate(moments.kept.sums):
        block = exact[number * length : (number + 1) * length]
        mu2, s2 = block.mean(0) ** 2, block.var(0)
        for group in range(4):
            keep = (index == group) & (s2 > 0)
            ratio = mu2[keep] / s2[keep]
            wanted = {
                "count": float(keep.sum()),
                "snr": float(ratio.sum()),
                "mu2": float(mu2[keep].sum()),
                "s2": float(s2[keep].sum()),
                "damping": float((ratio / (1 + ratio)).sqrt().sum()),
                "log_snr": float(ratio.log().sum()),
            }
            for name, value in wanted.items():
                assert float(table[group, BLOCK_COLUMN[name]]) == pytest.approx(value, rel=1e-5, abs=1e-5)


def test_all_samples_of_the_kept_elements() -> None:
    """Beyond CELLS samples, each cell has the mean and the squared deviations of every 32nd sample."""
    n, samples = 1500, torch.randn(CELLS + 5, 1500, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    moments = with_samples(n)
    for number, sample in enumerate(samples):
        feed(moments, sample, (number, 700, 701), 0.25)
        if number in (3, CELLS - 1):
            means, squares = moments.kept.stacked()  # type: ignore[union-attr]
            assert torch.equal(means, samples[: number + 1, ::3].float() * 0.25) and squares is None
    exact = samples[:, ::3].double() * 0.25
    means, squares = moments.kept.stacked()  # type: ignore[union-attr]
    assert squares is not None and squares.shape == (5, 500)
    pairs = torch.stack([exact[:5], exact[CELLS:]])
    torch.testing.assert_close(means[:5].double(), pairs.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(squares.double(), pairs.var(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(means[5:].double(), exact[5:CELLS])


@pytest.mark.parametrize("make", [with_samples, with_blocks])
def test_state_round_trip_is_bitwise(make: Callable[[int], Accumulators]) -> None:
    n, count = 1500, CELLS + 13
    samples = gradients(count, n)
    through, resumed = make(n), make(n)
    for sample in samples[: CELLS + 6]:  # blocks: one is half full; cells: some have two samples
        feed(through, sample)
    resumed.load_state_dict(copy.deepcopy(through.state_dict()))
    for sample in samples[CELLS + 6 :]:
        feed(through, sample)
        feed(resumed, sample)
    assert through.count == resumed.count == count
    for key, value in through.state_dict().items():
        other = resumed.state_dict()[key]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, key


def test_state_that_does_not_fit_is_refused() -> None:
    state = Accumulators(10).state_dict()
    with pytest.raises(MolsCheckpointError, match="numel"):
        Accumulators(11).load_state_dict(state)
    blocks, cells = with_blocks(1000).state_dict(), with_samples(1000).state_dict()
    with pytest.raises(MolsCheckpointError, match="block_length=5"):
        with_blocks(1000).load_state_dict({**blocks, "block_length": 5})
    with pytest.raises(MolsCheckpointError, match="float32"):
        Accumulators(10, dtype=torch.float64).load_state_dict(state)
    with pytest.raises(MolsCheckpointError, match="lacks block_length, block_mean, block_m2, block_sums"):
        with_blocks(1000).load_state_dict(cells)
    with pytest.raises(MolsCheckpointError, match="'block_sums' is no"):
        with_blocks(1000, 2).load_state_dict(blocks)
    with pytest.raises(MolsCheckpointError, match="lacks cells, cell_squares"):
        with_samples(1000).load_state_dict(blocks)
    with pytest.raises(MolsCheckpointError, match=r"'cells' is no torch.float32 tensor of shape \(0, 250\)"):
        with_samples(1000, 4).load_state_dict(cells)
    with pytest.raises(MolsCheckpointError, match="lacks m2"):
        Accumulators(10).load_state_dict({key: value for key, value in state.items() if key != "m2"})


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([(0, 50)], r"\[50, 100\) were missed in gradient sample 1"),
        ([(60, 40), (0, 50)], r"\[50, 60\) were missed"),
        ([(0, 60), (50, 50)], r"\[50, 60\) were updated twice"),
        ([(0, 100), (0, 100)], r"\[0, 100\) were updated twice"),
        ([], r"\[0, 100\) were missed"),
    ],
)
def test_every_element_exactly_once(pieces: list[tuple[int, int]], message: str) -> None:
    moments = Accumulators(100)
    moments.open()
    for offset, numel in pieces:
        moments.update(offset, torch.ones(numel))
    with pytest.raises(MolsError, match=message):
        moments.close()


def test_order_of_calls_is_enforced() -> None:
    moments = Accumulators(10)
    with pytest.raises(MolsError, match="open"):
        moments.update(0, torch.ones(10))
    with pytest.raises(MolsError, match="without an open"):
        moments.close()
    moments.open()
    with pytest.raises(MolsError, match="open already"):
        moments.open()
    with pytest.raises(MolsError, match="inside a gradient sample"):
        moments.state_dict()
    moments.abort()
    assert moments.count == 0
    moments.open()
    with pytest.raises(MolsError, match="exceeds"):
        moments.update(1, torch.ones(10))
    with pytest.raises(MolsError, match="1-D float"):
        moments.update(0, torch.ones(10, dtype=torch.int32))
    with pytest.raises(MolsError, match="1-D float"):
        moments.update(0, torch.ones(5, 2))
    moments.update(0, torch.ones(10))
    with pytest.raises(MolsError, match="cannot be dropped"):
        moments.abort()
    moments.close()


def test_bad_arguments() -> None:
    with pytest.raises(MolsConfigError, match="float32"):
        Accumulators(10, dtype=torch.bfloat16)


@pytest.mark.parametrize("n", [10_000, 1_000_003])
def test_accumulators_take_8_bytes_an_element(n: int) -> None:
    assert Accumulators(n).nbytes == with_samples(n, 127).nbytes == 8 * n


def test_freed_accumulators_hold_nothing() -> None:
    moments = with_samples(1000)
    for _ in range(4):
        feed(moments, torch.randn(1000))
    moments.free()
    assert moments.nbytes == 0
    assert moments.count == 4 and moments.kept is None
    for use in (moments.open, moments.state_dict):
        with pytest.raises(MolsError, match="freed"):
            use()


@pytest.mark.parametrize("make", [with_samples, lambda n: with_blocks(n, 2)])
def test_a_rank_without_elements_keeps_step(make: Callable[[int], Accumulators]) -> None:
    moments = make(0)
    for number in range(8):
        moments.open()
        if number % 2:
            moments.update(0, torch.ones(0))
        moments.close()
    assert moments.count == 8
    if isinstance(moments.kept, SampleBlocks):
        assert [table.tolist() for table in moments.kept.sums] == [[[0.0] * len(BLOCK_COLUMN)] * 2]


def test_gradients_from_another_device() -> None:
    """A meta accumulator has no values: tests that pieces are moved to it and cover the sample."""
    moments = Accumulators(300, device="meta")
    feed(moments, torch.ones(300), (100,))
    assert moments.count == 1
    assert moments.mean.device.type == "meta"
