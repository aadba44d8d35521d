"""A report's groups against the statistics of the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.helpers.oracle import histogram
from tests.helpers.oracle.statistics import GroupValues

EXACT_MEDIAN_RTOL = 0.01  # the product's median comes from bins of at most 1 % relative width
MOVED_ONCE_RTOL = 2e-5  # the product tells "moved once" by |K SNR_i - 1| <= 1e-5, which a few others meet by chance

Rows = Mapping[str, Mapping[str, Any]]


def row_of(rows: Rows, group: str, estimator: str) -> float:
    """The uncorrected value of an estimator."""
    return float(rows[group][estimator if estimator in ("damping", "step_rms") else f"snr_{estimator}"])


def check_values(rows: Rows, truth: Mapping[str, GroupValues], rtol: float) -> None:
    """Counts exactly, every estimator within `rtol`, uncorrected as the report has them."""
    assert list(rows) == list(truth)
    for group, values in truth.items():
        assert rows[group]["elements"] == values.elements
        assert rows[group]["never_moved_share"] == values.never_moved / values.elements
        assert rows[group]["unseen_share"] == values.unseen / values.elements
        for estimator in ("mean", "pooled", "damping", "step_rms"):
            expected = values.estimate(estimator, corrected=False)
            assert row_of(rows, group, estimator) == pytest.approx(expected, rel=rtol), (group, estimator)
        low, high = histogram.median_bounds(values.snr, rtol)
        assert low <= rows[group]["snr_median"] <= high, group
        exact = values.estimate("median", corrected=False)
        assert rows[group]["snr_median"] == pytest.approx(exact, rel=EXACT_MEDIAN_RTOL), group


def check_rows(rows: Rows, truth: Mapping[str, GroupValues], chosen: str, rtol: float) -> None:
    """`check_values` and `check_moved_once`, and that `snr` is the chosen estimator."""
    check_values(rows, truth, rtol)
    check_moved_once(rows, truth)
    for group, values in truth.items():
        _check_chosen(rows[group], values, chosen, rtol)


def check_moved_once(rows: Rows, truth: Mapping[str, GroupValues]) -> None:
    """The number of elements that moved in exactly one sample."""
    for group, values in truth.items():
        once = round(rows[group]["moved_once_share"] * values.elements)
        assert values.moved_once <= once <= values.looks_moved_once(MOVED_ONCE_RTOL), group


def _check_chosen(row: Mapping[str, Any], values: GroupValues, chosen: str, rtol: float) -> None:
    """`snr` is the chosen estimator with the noise floor taken off; its error is that of the uncorrected value."""
    k = values.samples
    expected = values.estimate(chosen, corrected=True)
    if chosen == "median":
        low, high = ((k - 3) / (k - 1) * bound - 1 / k for bound in histogram.median_bounds(values.snr, rtol))
        assert low <= row["snr"] <= high
    elif chosen == "step_rms":  # its square has the error of a mean
        assert row["snr"] ** 2 == pytest.approx(expected**2, rel=2 * rtol, abs=rtol / k)
    else:
        assert row["snr"] == pytest.approx(expected, rel=rtol, abs=rtol / k)
