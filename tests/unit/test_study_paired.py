"""Paired comparisons of a study: Student's t, Holm, shares, against tables, closed forms and hand calculation."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from mols_ds.apps.study.paired import Difference, compare, holm, share


def difference(t: float, degrees: int) -> tuple[Difference, float]:
    """Two arms whose paired t statistic is `t`, and the standard error of their mean difference."""
    noise = [(-1.0) ** i for i in range(degrees + 1)]
    mean = statistics.fmean(noise)
    noise = [value - mean for value in noise]
    error = statistics.stdev(noise) / math.sqrt(degrees + 1)
    found = compare({i: t * error + value for i, value in enumerate(noise)}, dict.fromkeys(range(degrees + 1), 0.0))
    assert found is not None
    return found, error


def p_value(t: float, degrees: int) -> float:
    found, _ = difference(t, degrees)
    assert found.p is not None
    return found.p


@pytest.mark.parametrize(
    ("degrees", "t", "p"),
    # Two-sided critical values as printed in tables of Student's t; their last digit is good for a relative 1e-4 in p.
    [
        (1, 12.7062, 0.05),
        (1, 63.6567, 0.01),
        (2, 4.30265, 0.05),
        (4, 2.77645, 0.05),
        (4, 4.60409, 0.01),
        (4, 8.61030, 0.001),
        (9, 2.26216, 0.05),
        (30, 2.04227, 0.05),
        (120, 1.97993, 0.05),
    ],
)
def test_p_value_agrees_with_tables(degrees: int, t: float, p: float) -> None:
    assert p_value(t, degrees) == pytest.approx(p, rel=1e-4)
    assert p_value(-t, degrees) == pytest.approx(p, rel=1e-4)


@pytest.mark.parametrize("t", [0.0, 1e-3, 0.3, 1.0, 4.0, 50.0, 1e4])
def test_p_value_agrees_with_closed_forms(t: float) -> None:
    # 1e-12 absolute: the closed forms themselves cancel where p is small.
    assert p_value(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, rel=1e-9, abs=1e-12)
    assert p_value(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9, abs=1e-12)
    assert p_value(t, 10**4) == pytest.approx(math.erfc(t / math.sqrt(2)), rel=1e-4, abs=1e-5)


def test_p_value_is_5_percent_at_the_interval_ends() -> None:
    """So an interval excludes zero where p is below 0.05."""
    for degrees in [*range(1, 80), 500]:
        found, error = difference(1.0, degrees)
        assert found.high is not None
        assert p_value((found.high - found.mean) / error, degrees) == pytest.approx(0.05, rel=1e-6)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_paired_difference_by_hand() -> None:
    found = compare({1: 1.9, 2: 2.8, 3: 3.7, 9: 0.0}, {1: 2.0, 2: 3.0, 3: 4.0})
    assert found is not None
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((-0.2, -0.2 - half, -0.2 + half))
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))  # t = 2 sqrt(3), n = 2
    assert (found.pairs, found.won, found.clear) == (3, 3, False)
    assert compare({1: 1.0}, {2: 1.0}) is None


def test_paired_difference_at_its_borders() -> None:
    same = compare({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0})
    assert same is not None and (same.mean, same.low, same.high, same.p, same.won) == (0, 0, 0, 1.0, 0)
    assert not same.clear
    alone = compare({1: 1.0}, {1: 2.0})
    assert alone is not None and (alone.mean, alone.low, alone.p, alone.won) == (-1.0, None, None, 1)
    arm = compare({1: math.inf, 2: 1.0}, {1: 2.0, 2: 2.0})
    assert arm is not None and (arm.mean, arm.low, arm.p, arm.won, arm.clear) == (math.inf, None, None, 1, False)
    base = compare({1: 1.0, 2: 1.0}, {1: math.inf, 2: 0.5})
    assert base is not None and (base.mean, base.low, base.won) == (-math.inf, None, 1)
    both = compare({1: math.inf}, {1: math.inf})
    assert both is not None and math.isnan(both.mean) and both.won == 0


def test_no_share_of_a_gain_that_is_not_clear_of_zero() -> None:
    base = dict.fromkeys(range(4), 3.0)
    noisy = {0: 2.0, 1: 3.9, 2: 2.5, 3: 3.2}
    assert share(dict.fromkeys(range(4), 2.9), noisy, base) is None
    assert share(dict.fromkeys(range(4), 2.9), dict.fromkeys(range(4), 3.1), base) is None, "the search lost"
    assert share({0: 2.9}, {0: 2.8}, base) is None, "one seed"
    assert share({**base, 1: math.inf}, dict.fromkeys(range(4), 2.0), base) is None


@pytest.mark.parametrize(
    ("studies", "tolerance"), [(400, 0.033), pytest.param(4000, 0.011, marks=pytest.mark.tier("all"))]
)
def test_the_interval_of_a_share_holds_the_truth_in_95_percent_of_studies(studies: int, tolerance: float) -> None:
    """Gains of 0.3 of 0.4 with correlated noise, 8 seeds. The tolerance is 3 sigma."""
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(studies):
        common, mine, theirs = (draw.normal(0, 0.08, 8) for _ in range(3))
        base = dict(enumerate(3 + common))
        arm = {seed: value - 0.3 + mine[seed] for seed, value in base.items()}
        best = {seed: value - 0.4 + theirs[seed] + 0.5 * mine[seed] for seed, value in base.items()}
        found = share(arm, best, base)
        assert found is not None
        hits += found.low <= 0.75 <= found.high
    assert hits / studies == pytest.approx(0.95, abs=tolerance)
