"""Medians, intervals and alphas out of group sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mols_ds.core.columns import BLOCK_COLUMN
from mols_ds.core.estimators import (
    ESTIMATORS,
    Estimator,
    compute_alphas,
    estimate,
    histogram_median,
    intervals,
)
from mols_ds.core.group_stats import (
    BINS_PER_OCTAVE,
    COLUMN,
    N_BINS,
    OCTAVES,
    GroupSums,
    NoiseFloor,
    bin_edges,
    noise_floor,
)
from mols_ds.core.intervals import t_quantile
from mols_ds.errors import MolsConfigError, MolsError
from tests.unit.group_sums import sums_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_bins_are_at_most_1_percent_wide() -> None:
    edges = bin_edges()
    assert edges.numel() == N_BINS - 1
    assert float((edges[1:] / edges[:-1]).max()) <= 1.01
    half = 2.0 ** (0.5 / BINS_PER_OCTAVE)
    assert (float(edges[0]), float(edges[-1])) == pytest.approx((2.0**-OCTAVES * half, 2.0**OCTAVES * half))
    # 1/K, which elements that moved once read exactly, is no edge for any K
    reads = torch.tensor([1.0 / k for k in range(2, 257)], dtype=torch.float64)
    assert float((edges[:, None] / reads[None] - 1.0).abs().min()) > 5e-5


@pytest.mark.parametrize("n", [1, 2, 3, 1000, 10_001])
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_median_is_within_1_percent(n: int, spread: float) -> None:
    values = torch.exp(spread * normal(n, seed=n)).double()
    sums = GroupSums.zeros(("vo",), NoiseFloor(1.0, 0.0))
    sums.add_squares("vo", values, torch.ones_like(values))
    assert estimate(sums, "median", False)["vo"] == pytest.approx(float(values.quantile(0.5)), rel=0.01)


def test_median_in_the_open_bins() -> None:
    histogram = torch.zeros(N_BINS, dtype=torch.float64)
    assert math.isnan(histogram_median(histogram))
    histogram[0] = 3
    assert histogram_median(histogram) == float(bin_edges()[0])
    histogram[-1] = 4
    assert histogram_median(histogram) == float(bin_edges()[-1])
    sums = GroupSums.zeros(("vo",), NoiseFloor(1.0, 0.0))
    sums.add_squares("vo", torch.tensor([0.0, 1e-30, 1e30]), torch.ones(3))
    assert sums.histogram[0, [0, -1]].tolist() == [2.0, 1.0]
    assert sums.histogram.sum() == 3
    assert BINS_PER_OCTAVE * 2 * OCTAVES == N_BINS - 2


# ---------------------------------------------------------------------------------------------- intervals


def test_t_quantiles() -> None:
    for degrees, exact in ((1, 12.7062), (3, 3.18245), (30, 2.04227), (31, 2.03951), (60, 2.00030), (1000, 1.96234)):
        assert t_quantile(degrees) == pytest.approx(exact, rel=2e-6)


def test_intervals_need_eight_samples() -> None:
    assert all(math.isnan(end) for end in intervals(sums_of(normal(7, 2000)), "mean", True)["vo"])
    for name in ESTIMATORS:
        low, high = intervals(sums_of(normal(8, 2000)), name, True)["vo"]
        assert low < high, name


# ---------------------------------------------------------------------------------------------- alphas


def table_sums(values: dict[str, float], **columns: float) -> GroupSums:
    """Sums in which every group's plain mean and damping are these values; nan: no element moved."""
    sums = GroupSums.zeros(tuple(values), noise_floor(32))
    for row, value in enumerate(values.values()):
        moved = 0.0 if math.isnan(value) else 100.0
        sums.table[row, COLUMN["count"]] = moved
        sums.table[row, COLUMN["total"]] = 100.0
        sums.table[row, COLUMN["never_moved"]] = 100.0 - moved
        sums.table[row, COLUMN["snr"]] = sums.table[row, COLUMN["damping"]] = moved and moved * value
    return sums


def alphas_of(
    sums: GroupSums,
    estimator: Estimator = "mean",
    reference: str = "vo",
    low: float | None = None,
    high: float | None = None,
    correction: bool = False,
) -> tuple[str, dict[str, float]]:
    name, found = compute_alphas(
        sums, estimator=estimator, correction=correction, reference=reference, alpha_min=low, alpha_max=high
    )
    return name, {group: alpha.alpha for group, alpha in found.items()}


def test_alphas_follow_the_formulas() -> None:
    values = {"embedding": 0.01, "qk": 0.36, "vo": 0.16, "other": 0.0001}
    sums = table_sums(values)
    assert alphas_of(sums) == ("vo", pytest.approx({"embedding": 4.0, "qk": 2 / 3, "vo": 1.0, "other": 1.0}))
    assert alphas_of(sums, reference="max") == (
        "qk",
        pytest.approx({"embedding": 6.0, "qk": 1.0, "vo": 1.5, "other": 1.0}),
    )
    assert alphas_of(sums, "damping") == (
        "vo",
        pytest.approx({"embedding": 16.0, "qk": 0.16 / 0.36, "vo": 1.0, "other": 1.0}),
    )
    assert alphas_of(sums)[1]["vo"] == 1.0  # exactly


def test_alphas_are_bounded() -> None:
    sums = table_sums({"embedding": 1e-6, "head": 1e6, "qk": 1.0, "vo": 1.0})
    _, found = compute_alphas(sums, estimator="mean", correction=False, reference="vo", alpha_min=0.1, alpha_max=10.0)
    assert {group: (alpha.alpha, alpha.clamped) for group, alpha in found.items()} == {
        "embedding": (10.0, True),
        "head": (0.1, True),
        "qk": (1.0, False),
        "vo": (1.0, False),
    }
    assert math.isnan(found["embedding"].low)  # no blocks, no interval


def test_groups_without_signal_or_elements() -> None:
    sums = table_sums({"embedding": 0.02, "head": math.nan, "vo": 1.0})  # corrected: 29/31 * 0.02 - 1/32 < 0
    _, found = compute_alphas(sums, estimator="mean", correction=True, reference="vo", alpha_min=None, alpha_max=7.0)
    assert (found["embedding"].alpha, found["embedding"].clamped) == (7.0, True)
    assert (found["head"].alpha, found["head"].clamped) == (1.0, False)
    with pytest.raises(MolsError, match=r"'embedding' has no signal above the noise.*alpha_max"):
        alphas_of(sums, correction=True)
    assert math.isnan(estimate(sums, "mean", True)["head"])


def test_references_that_cannot_be_used() -> None:
    sums = table_sums({"embedding": 0.01, "head": math.nan, "vo": 1.0, "other": 1.0})
    with pytest.raises(MolsConfigError, match=r"reference='qk'.*use one of embedding, head, vo or 'max'"):
        alphas_of(sums, reference="qk")
    sums.table[2].zero_()  # a group of the model without an element anywhere
    with pytest.raises(MolsConfigError, match=r"reference='vo'.*use one of embedding, head or 'max'"):
        alphas_of(sums, reference="vo")
    with pytest.raises(MolsError, match="'head' has no usable SNR"):
        alphas_of(sums, reference="head")
    with pytest.raises(MolsError, match="'embedding' has no usable SNR"):
        alphas_of(sums, reference="embedding", correction=True)
    with pytest.raises(MolsError, match="no scaled group"):
        alphas_of(table_sums({"vo": math.nan, "other": 1.0}), reference="max")


def test_a_type_is_the_union_of_its_layers() -> None:
    samples = normal(16, 40_000) + torch.linspace(0, 1, 40_000)
    mean, m2 = samples.mean(0), samples.var(0) * 15
    layers = GroupSums.zeros(("qk.0", "vo.0", "vo.1"), noise_floor(16))
    for number, group in enumerate(layers.groups):
        part = slice(10_000 * number, 10_000 * (number + 1))
        layers.add(group, mean[part], m2[part], 16)
    types = GroupSums.zeros(("qk", "vo"), noise_floor(16))
    types.add("vo", mean[10_000:30_000], m2[10_000:30_000], 16)
    types.add("qk", mean[:10_000], m2[:10_000], 16)
    for name in ESTIMATORS:
        resolved, by_layer = alphas_of(layers, name, correction=True, high=100.0)
        _, by_type = alphas_of(types, name, correction=True, high=100.0)
        assert resolved == "vo"
        assert by_layer["qk.0"] == pytest.approx(by_type["qk"], rel=1e-12)
        assert by_layer["vo.0"] > 1 > by_layer["vo.1"]


def test_alpha_intervals() -> None:
    """Blocks with known spread: two groups of relative error e each give sqrt of a ratio with error e / sqrt(2)."""
    groups = ("embedding", "vo", "qk")
    sums = GroupSums.zeros(groups, NoiseFloor(1.0, 0.0), blocks=4)
    sums.table[:, COLUMN["count"]] = sums.table[:, COLUMN["total"]] = 1000.0
    sums.table[:, COLUMN["damping"]] = torch.tensor([100.0, 400.0, 5.0], dtype=torch.float64)
    sums.blocks[:, :, BLOCK_COLUMN["count"]] = 10.0
    wobble = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64)  # standard deviation 1.1547
    for row, size in enumerate((0.01, 0.01, 0.01)):
        sums.blocks[:, row, BLOCK_COLUMN["damping"]] = 10.0 * (0.1 + size * wobble)
    error = t_quantile(3) * 0.01 * float(wobble.std()) / 2
    assert intervals(sums, "damping", False)["vo"] == pytest.approx((0.4 - error, 0.4 + error))
    _, found = compute_alphas(
        sums, estimator="damping", correction=False, reference="vo", alpha_min=0.1, alpha_max=20.0
    )
    embedding = found["embedding"]
    down = math.hypot(math.log(0.4 / (0.4 - error)), math.log((0.1 + error) / 0.1))
    up = math.hypot(math.log((0.4 + error) / 0.4), math.log(0.1 / (0.1 - error)))
    assert embedding == pytest.approx((4.0, False, 4 * math.exp(-down), 4 * math.exp(up)))
    assert found["vo"] == (1.0, False, 1.0, 1.0)
    # qk: 0.005 with an error of 0.018: its lower end reaches 0, so all that bounds the multiplier is alpha_max.
    assert found["qk"].high == found["qk"].alpha == 20.0
    assert found["qk"].clamped
