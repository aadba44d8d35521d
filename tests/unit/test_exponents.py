"""Gradients whose squares fp32 does not have: they read what the same gradients of an ordinary size read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mols_ds.core.adam_moments import adam_moments
from mols_ds.core.columns import VALUE, WEIGHT
from mols_ds.core.estimators import ESTIMATORS, estimate
from mols_ds.core.exponents import UNDECIDED, Exponents
from mols_ds.core.group_stats import COLUMN, GroupSums, noise_floor
from mols_ds.core.layout import ElementLayout
from mols_ds.core.local_stats import LocalStats
from mols_ds.core.ranges import ShardRange
from mols_ds.errors import MolsCheckpointError

SAMPLES, NUMEL = 16, 3000
LAYOUTS = {name: ElementLayout.whole(name) for name in ("qk", "mlp")} | {
    "fused": ElementLayout(5, ((2, "qk"), (1, "vo")))
}
GROUPS = ("qk", "mlp", "vo")
RANGES = [ShardRange("qk", 0, 0, NUMEL), ShardRange("mlp", 7, NUMEL, 1), ShardRange("fused", 3, NUMEL + 1, NUMEL)]
TOTAL = 2 * NUMEL + 1


def stats() -> LocalStats:
    return LocalStats(RANGES, LAYOUTS, GROUPS, torch.device("cpu"))


def gradients(seed: int = 0) -> Tensor:
    """(SAMPLES, TOTAL) fp32 of signal and noise around 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOTAL, generator=generator) + torch.randn(SAMPLES, TOTAL, generator=generator)


def scaled(samples: Tensor, powers: Sequence[int]) -> Tensor:
    """Each range times its power of two."""
    result = samples.clone()
    for item, power in zip(RANGES, powers, strict=True):
        result[:, item.offset : item.offset + item.numel] *= 2.0**power
    return result


def feed(measured: LocalStats, samples: Tensor, cuts: Sequence[int] = (1234, NUMEL + 5), scale: float = 1.0) -> None:
    edges = [0, *cuts, TOTAL]
    for sample in samples:
        measured.open()
        for low, high in itertools.pairwise(edges):
            measured.add(low, sample[low:high] / scale, scale)
        measured.close()


def sums(samples: Tensor, **more: Any) -> GroupSums:
    measured = stats()
    feed(measured, samples, **more)
    return measured.gradient_sums()


def relative(table: GroupSums) -> dict[str, Tensor]:
    """What does not depend on the gradients' unit."""
    columns = [COLUMN[name] for name in COLUMN if name not in ("mu2", "s2")]
    return {
        "table": table.table[:, columns],
        "histogram": table.histogram,
        "replicates": table.replicates[:, :, [n for name, n in VALUE.items() if name not in ("mu2", "s2")]],
        "curve": table.spreads[:, WEIGHT:],
    }


@pytest.mark.parametrize("power", [-100, -80, -75, -70, -65, -60, -45, 45, 60, 80])
def test_a_unit_makes_no_difference(power: int) -> None:
    """Powers of two are exact, so all that has no unit has equal bits, and the rest is theirs times 4^power."""
    plain, other = sums(gradients()), sums(scaled(gradients(), [power] * 3))
    for key, value in relative(plain).items():
        torch.testing.assert_close(relative(other)[key], value, rtol=1e-13, atol=0)
    for name in ("mu2", "s2"):
        torch.testing.assert_close(
            other.table[:, COLUMN[name]], plain.table[:, COLUMN[name]] * 4.0**power, rtol=1e-13, atol=0
        )
    assert not any(other.not_finite().values())


@pytest.mark.parametrize("powers", [(-70, 0, 0), (0, -80, 60), (60, 0, -77), (-60, 60, -60)])
def test_ranges_of_unlike_sizes(powers: tuple[int, int, int]) -> None:
    """Against float64 statistics of the same samples: one group is small, its neighbours are not."""
    samples = scaled(gradients(), powers)
    measured = sums(samples, cuts=(17, NUMEL, NUMEL + 2000), scale=2.0**-10)
    exact = samples.double()
    mean, variance = exact.mean(0), exact.var(0)
    oracle = GroupSums.zeros(GROUPS, noise_floor(SAMPLES))
    for item in RANGES:
        part = slice(item.offset, item.offset + item.numel)
        oracle.add_range(LAYOUTS[item.name], item.start, mean[part], variance[part] * (SAMPLES - 1), SAMPLES)
    for name in ESTIMATORS:
        if name == "pooled" and len(set(powers)) > 1:
            continue
        for group, value in estimate(oracle, name, True).items():
            assert estimate(measured, name, True)[group] == pytest.approx(value, rel=2e-5), (name, group)


@pytest.mark.parametrize("power", [-78, 70])
@pytest.mark.parametrize("first", [1, 7, 8, 11])
def test_a_range_that_moves_later(power: int, first: int) -> None:
    """Its first squares were lost before its size was known."""
    samples = gradients()
    samples[:first] = 0.0
    plain, other = sums(samples), sums(scaled(samples, [power] * 3))
    for key, value in relative(plain).items():
        torch.testing.assert_close(relative(other)[key], value, rtol=1e-5, atol=1e-6)


def test_ordinary_gradients_keep_their_bits() -> None:
    from mols_ds.core.accumulators import Accumulators

    samples = scaled(gradients(), [-30, 0, 20])
    measured = stats()
    feed(measured, samples)
    assert measured.accumulators is not None
    plain = Accumulators(TOTAL)
    for sample in samples:
        plain.open()
        plain.update(0, sample)
        plain.close()
    assert torch.equal(measured.accumulators.mean, plain.mean) and torch.equal(measured.accumulators.m2, plain.m2)


@pytest.mark.parametrize("at", [0, 1, 5, 8])
def test_a_half_done_calibration_goes_on(at: int) -> None:
    samples = scaled(gradients(), [-75, 0, 60])
    samples[:2, : RANGES[1].offset] = 0.0
    whole, first, second = stats(), stats(), stats()
    feed(whole, samples)
    first.open()  # makes the accumulators
    first.accumulators.abort()  # type: ignore[union-attr]
    feed(first, samples[:at])
    saved = first.state_dict()
    assert saved is not None
    second.load_state_dict(saved)
    feed(second, samples[at:])
    assert torch.equal(second.gradient_sums().pack(), whole.gradient_sums().pack())


@pytest.mark.parametrize("at", [1, 5])
def test_a_state_of_release_0_4_0_goes_on(at: int) -> None:
    """It has no exponents: what moved stays as it is, what did not is still to be decided."""
    samples = scaled(gradients(), [0, 0, 60])
    samples[:at, RANGES[2].offset :] = 0.0
    whole, first, second = stats(), stats(), stats()
    for measured in (whole, first):
        measured.accumulators = measured._new(of_0_4_0=True)
    feed(whole, samples)
    feed(first, samples[:at])
    saved = first.state_dict()
    assert saved is not None
    del saved["moments"]["exponents"]
    second.load_state_dict(saved)
    assert second.accumulators is not None and second.accumulators.exponents.undecided == [2]
    feed(second, samples[at:])
    assert len(second.gradient_sums().blocks) == 2
    assert torch.equal(second.gradient_sums().pack(), whole.gradient_sums().pack())


@pytest.mark.parametrize(
    "wrong", [[1.5], torch.zeros(2, dtype=torch.int16), torch.tensor([0, 101, 0], dtype=torch.int16)]
)
def test_exponents_that_do_not_fit_are_refused(wrong: Any) -> None:
    first, second = stats(), stats()
    feed(first, gradients()[:3])
    saved = first.state_dict()
    assert saved is not None
    saved["moments"]["exponents"] = wrong
    with pytest.raises(MolsCheckpointError, match="'exponents' are not"):
        second.load_state_dict(saved)


def test_parts_cover_the_elements_once() -> None:
    exponents = Exponents([0, 3, 3, 5, 9, 12])
    exponents.load(torch.tensor([0, 7, 7, UNDECIDED, 2], dtype=torch.int16))
    assert list(exponents.parts(0, 12)) == [(0, 3, 0), (3, 5, 7), (5, 9, 0), (9, 12, 2)]
    assert list(exponents.parts(4, 2)) == [(4, 5, 7), (5, 6, 0)] and list(exponents.parts(12, 0)) == []
    assert exponents.state().tolist() == [0, 7, 7, UNDECIDED, 2]


def test_elements_far_below_their_range_are_left_out() -> None:
    """Their squares are multiples of 2^-149: an SNR that is twice too high would decide the group's mean."""
    samples = gradients()
    samples[:, : NUMEL // 2] *= 2.0**-73
    found = sums(samples)
    row = found.table[0]
    assert row[COLUMN["constant"]] == NUMEL // 2
    samples[:, : NUMEL // 2] = 0.0
    assert row[COLUMN["snr"]] == sums(samples).table[0][COLUMN["snr"]]


@pytest.mark.parametrize("power", range(-85, -40, 5))
def test_adams_moments_of_small_gradients(power: int) -> None:
    """Adam's own state loses the squares: its elements are left out before they read an SNR that is wrong."""
    betas, numel, step = (0.9, 0.999), 20_000, 400
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(numel, generator=generator) * 0.3
    m, v = torch.zeros(numel), torch.zeros(numel)
    exact_m, exact_v = torch.zeros(numel).double(), torch.zeros(numel).double()
    for _ in range(step):
        g = (signal + torch.randn(numel, generator=generator)) * 2.0**power
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        exact_m.lerp_(g.double(), 1 - betas[0])
        exact_v.mul_(betas[1]).addcmul_(g.double(), g.double(), value=1 - betas[1])
    mu2, s2, _ = adam_moments(m, v, step, *betas)
    true_mu2, true_s2, _ = adam_moments(exact_m, exact_v, step, *betas)
    kept = s2 > 0
    assert bool(kept.any()) == (power >= -55) and bool((mu2 > 0).all())
    if power >= -55:
        ratio = (mu2.double() / s2.double())[kept & (true_s2 > 0)] / (true_mu2 / true_s2)[kept & (true_s2 > 0)]
        assert float((ratio - 1).abs().quantile(0.999)) < 0.06 and math.isclose(float(ratio.median()), 1, rel_tol=1e-3)
