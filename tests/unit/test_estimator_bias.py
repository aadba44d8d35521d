"""Bias of the estimators on Gaussian gradients: the product's readings against exact expectations.

K mu^2 / (K mu^2 + (K - 1) s^2) is noncentral beta: Beta(1/2 + j, (K - 1)/2) with j Poisson of K SNR / 2.
The expectation and the variance of each element's value are integrals over it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from mols_ds.core.schema import Estimator
from tests.tools.estimator_bias import MIXES, main, readings, truth

NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)
DEVIATIONS = 5.0  # a reading may be off by this many standard deviations: one in 2 million is, of about 150

Function = Callable[[np.ndarray, int], np.ndarray]
OF_AN_ELEMENT: dict[Estimator, Function] = {  # of the ratio mu^2 / s^2 and K, noise floor corrected
    "mean": lambda r, k: (k - 3) / (k - 1) * r - 1 / k,
    "damping": lambda r, k: np.sqrt(1 - 1 / (1 + np.maximum(0, (k - 3) / (k - 1) * r - 1 / k))),
    "step_rms": lambda r, k: (r - 1 / k) / (r + 1 - 1 / k),  # its square
}


def moments(function: Function, snr: float, k: int) -> tuple[float, float]:
    """Mean and variance of an element's value."""
    rate, first, second = k * snr / 2, 0.0, 0.0
    x = (NODES + 1) * math.pi / 4  # beta = sin(x)^2 has no singularity at its ends
    beta = np.sin(x) ** 2
    value = function((k - 1) / k * beta / (1 - beta), k)
    for j in range(int(rate + 12 * math.sqrt(rate) + 12)):
        density = stats.poisson.pmf(j, rate) * stats.beta.pdf(beta, 0.5 + j, (k - 1) / 2)
        weight = WEIGHTS * math.pi / 4 * np.sin(2 * x) * density
        first, second = first + float(weight @ value), second + float(weight @ value**2)
    return first, second - first**2


def expected(estimator: Estimator, name: str, k: int) -> tuple[float, float]:
    """Mean over a mix of SNR, and the standard deviation of one element around its own mean."""
    found = [moments(OF_AN_ELEMENT[estimator], snr, k) for snr in MIXES[name]]
    return float(np.mean([mean for mean, _ in found])), math.sqrt(np.mean([variance for _, variance in found]))


@pytest.mark.parametrize("k", [4, 8, 32])
@pytest.mark.parametrize("name", ["0", "0.01", "0.1", "1", "half 1, half 0"])
def test_readings_have_their_exact_expectation(name: str, k: int) -> None:
    size = 40_000
    found = readings(MIXES[name], k, size, runs=1, seed=7)
    for estimator in OF_AN_ELEMENT:
        if estimator == "mean" and k == 4:  # no finite variance
            continue
        mean, deviation = expected(estimator, name, k)
        value = float(found[estimator, True][0])
        error = DEVIATIONS * deviation / math.sqrt(size)
        if estimator == "step_rms":
            assert math.sqrt(max(0.0, mean - error)) - 1e-12 <= value <= math.sqrt(max(0.0, mean + error)), (name, k)
        else:
            assert value == pytest.approx(mean, abs=error), (estimator, name, k)


def reads(estimator: Estimator, name: str, k: int) -> float:
    """The expected reading of a large group."""
    mean, _ = expected(estimator, name, k)
    return math.sqrt(max(0.0, mean)) if estimator == "step_rms" else mean


def test_pure_noise() -> None:
    """`step_rms` has no noise floor; `damping` has one, from the clamp of each element."""
    for k in (4, 8, 32):
        assert expected("step_rms", "0", k)[0] == pytest.approx(0.0, abs=1e-9)
    assert [round(reads("damping", "0", k), 3) for k in (8, 32)] == [0.097, 0.058]


def test_known_signal() -> None:
    """A true step of 0.302; half of the elements 0.707 and half 0."""
    assert truth(MIXES["0.1"])["step_rms"] == pytest.approx(0.3015, abs=1e-4)
    assert [round(reads("damping", "0.1", k), 3) for k in (8, 32)] == [0.175, 0.234]
    assert [round(reads("step_rms", "0.1", k), 3) for k in (8, 32)] == [0.274, 0.294]
    half = truth(MIXES["half 1, half 0"])
    assert (round(half["damping"], 3), round(half["step_rms"], 3)) == (0.354, 0.500)
    assert reads("step_rms", "half 1, half 0", 32) == pytest.approx(0.500, abs=0.005)


@pytest.mark.parametrize("k", [8, 16, 32, 128])
def test_bias_of_the_squared_step(k: int) -> None:
    """Of second order in 1/K: d^2 is too small by a share of 2 (1 - d^2)^2 / K."""
    for snr in (0.01, 0.1, 1.0, 10.0):
        true = snr / (1 + snr)
        share = 1 - moments(OF_AN_ELEMENT["step_rms"], snr, k)[0] / true
        assert share == pytest.approx(2 * (1 - true) ** 2 / k, abs=8 / k**2)


def test_the_tool_prints_its_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.tools.estimator_bias.SIZES", (100,))
    monkeypatch.setattr("tests.tools.estimator_bias.SAMPLES", (8,))
    main(["--runs", "1"])
    assert capsys.readouterr().out.count("| **half 1, half 0** | true | **0.5**") == 2
