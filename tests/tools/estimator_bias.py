"""Bias and spread of every estimator on gradients with known SNR, and coverage of the 95 % intervals.

    python -m tests.tools.estimator_bias [--runs 200]                   # docs/evidence/estimators.md has their output
    python -m tests.tools.estimator_bias --intervals [--runs 200]

For the bias, the samples of an element are Gaussian with variance 1, so the mean and the sum of squared deviations of K
samples are drawn directly. The product's group sums and estimators read them. For the intervals, all samples are drawn:
elements of one sample are correlated (`NOISES`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np
import torch

from mols_ds.core.estimators import ESTIMATORS, estimate, intervals
from mols_ds.core.group_stats import GroupSums, noise_floor
from mols_ds.core.layout import ElementLayout
from mols_ds.core.local_stats import LocalStats
from mols_ds.core.ranges import ShardRange
from mols_ds.core.schema import Estimator

MIXES: dict[str, Sequence[float]] = {
    "0": [0.0],
    "0.01": [0.01],
    "0.1": [0.1],
    "1": [1.0],
    "10": [10.0],
    "half 1, half 0": [0.0, 1.0],
    "1e-4 to 10, log-uniform": (10.0 ** np.linspace(-4, 1, 100)).tolist(),
    "log-normal": np.exp(2 * np.random.default_rng(0).standard_normal(1000) - 3).tolist(),
}
"""Name -> SNR of the elements, each of equally many."""
Noise = Literal["alone", "norm", "shared", "both"]
NOISES: dict[Noise, str] = {
    "alone": "elements are independent",
    "norm": "each sample has a log-normal factor (sigma 0.3): the norms of gradients vary",
    "shared": "half of the variance is noise of rank 10 that all elements share",
    "both": "the last two",
}
COVERED = ("0", "0.1", "10", "half 1, half 0", "log-normal")
COVERED_SAMPLES = (8, 16, 32)
COVERED_SIZES = {
    256: (COVERED, COVERED_SAMPLES, 1.0),
    4096: (("0.1", "half 1, half 0"), (16,), 0.5),
    100_000: (("0.1",), (32,), 0.25),
}
"""Elements -> (SNR, K, share of the runs)."""
SAMPLES = (4, 8, 16, 32, 128)
SIZES = (100, 10_000, 1_000_000)


def truth(snr: Sequence[float]) -> dict[Estimator, float]:
    """What each estimator is about: the SNR, or the effective step d = sqrt(SNR / (1 + SNR)), of the group."""
    values = np.asarray(snr)
    step2 = values / (1 + values)
    mean = float(values.mean())
    return {
        "mean": mean,
        "median": float(np.median(values)),
        "pooled": mean,
        "damping": float(np.sqrt(step2).mean()),
        "step_rms": float(np.sqrt(step2.mean())),
    }


Readings = dict[tuple[Estimator, bool], np.ndarray]


def readings(snr: Sequence[float], samples: int, size: int, runs: int, seed: int) -> Readings:
    """Read `runs` groups of `size` elements. Returns (estimator, noise floor corrected) -> value of each run."""
    random = np.random.default_rng(seed)
    signal = np.sqrt(np.resize(np.asarray(snr), size))
    found: dict[tuple[Estimator, bool], list[float]] = {}
    for _ in range(runs):
        mean = torch.from_numpy(signal + random.standard_normal(size) / np.sqrt(samples))
        m2 = torch.from_numpy(random.chisquare(samples - 1, size))
        sums = GroupSums.zeros(("vo",), noise_floor(samples))
        sums.add("vo", mean, m2, samples)
        for estimator in ESTIMATORS:
            for correction in (True, False):
                value = estimate(sums, estimator, correction)["vo"]
                found.setdefault((estimator, correction), []).append(value)
    return {key: np.asarray(values) for key, values in found.items()}


def table(size: int, runs: int, correction: bool) -> list[str]:
    """Markdown rows: mean reading and its spread (standard deviation over groups) beside the truth."""
    lines = [f"| SNR | K | {' | '.join(ESTIMATORS)} |", "|---|---|" + "---|" * len(ESTIMATORS)]
    for name, snr in MIXES.items():
        known = truth(snr)
        lines.append(f"| **{name}** | true | {' | '.join(f'**{known[e]:.4g}**' for e in ESTIMATORS)} |")
        for samples in SAMPLES:
            found = readings(snr, samples, size, runs, seed=samples)
            cells = [f"{found[e, correction].mean():.3g} ± {found[e, correction].std():.1g}" for e in ESTIMATORS]
            lines.append(f"| | {samples} | {' | '.join(cells)} |")
    return lines


def gradients(noise: Noise, signal: np.ndarray, samples: int, mixing: np.ndarray, seed: int) -> np.ndarray:
    """(samples, elements) float32. mixing: (10, elements)."""
    random = np.random.default_rng(seed)
    drawn = random.standard_normal((samples, signal.size), dtype=np.float32)
    if noise in ("shared", "both"):
        drawn = np.sqrt(0.5) * drawn + random.standard_normal((samples, 10)) @ mixing
    drawn = signal + drawn
    if noise in ("norm", "both"):
        drawn = drawn * np.exp(0.3 * random.standard_normal((samples, 1)))
    return drawn.astype(np.float32)


def coverage(noise: Noise, snr: str, samples: int, size: int, runs: int) -> dict[Estimator, tuple[float, float]]:
    """Calibrate one group `runs` times.

    Returns:
        estimator -> (share of the corrected intervals that hold the long-run value, which is the mean of the estimates
        (of their squares for step_rms, the median for median); their median half width over 1.96 standard deviations).
    """
    random = np.random.default_rng(0)
    signal = np.sqrt(np.resize(np.asarray(MIXES[snr]), size)) * np.where(random.random(size) < 0.5, 1, -1)
    mixing = random.standard_normal((10, size)) * np.sqrt(0.05)
    found: dict[Estimator, list[tuple[float, float, float]]] = {name: [] for name in ESTIMATORS}
    for run in range(runs):
        stats = LocalStats(
            [ShardRange("w", 0, 0, size)], {"w": ElementLayout.whole("vo")}, ("vo",), torch.device("cpu")
        )
        for sample in torch.from_numpy(gradients(noise, signal, samples, mixing, run + 1)):
            stats.open()
            stats.add(0, sample, 1.0)
            stats.close()
        sums = stats.gradient_sums()
        for name in ESTIMATORS:
            found[name].append((estimate(sums, name, True)["vo"], *intervals(sums, name, True)["vo"]))
    result: dict[Estimator, tuple[float, float]] = {}
    for name, rows in found.items():
        value, low, high = np.asarray(rows).T
        long_run = np.median(value) if name == "median" else value.mean()
        if name == "step_rms":
            long_run = np.sqrt((value * value).mean())
        share = float(((low <= long_run) & (long_run <= high)).mean())
        result[name] = share, float(np.median(high - low) / 2 / 1.96 / value.std())
    return result


def coverage_table(noise: Noise, runs: int) -> Iterator[str]:
    """Yield Markdown rows: coverage in percent, and the half width in brackets."""
    yield f"| SNR | K | elements | {' | '.join(ESTIMATORS)} |"
    yield "|---|---|---|" + "---|" * len(ESTIMATORS)
    for size, (mixes, numbers, share) in COVERED_SIZES.items():
        for snr in mixes:
            for samples in numbers:
                cells = coverage(noise, snr, samples, size, max(2, int(share * runs))).values()
                text = " | ".join(f"{100 * covered:.1f} ({width:.2g})" for covered, width in cells)
                yield f"| {snr} | {samples} | {size:,} | {text} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="groups of 10,000 elements; others in proportion")
    parser.add_argument("--intervals", action="store_true", help="coverage of the intervals instead of bias")
    parser.add_argument("--noise", choices=get_args(Noise), action="append", help="only this kind")
    args = parser.parse_args(arguments)
    runs = args.runs
    if args.intervals:
        for noise in args.noise or get_args(Noise):
            print(f"\n**{noise}**: {NOISES[noise]}:\n", flush=True)
            for row in coverage_table(noise, runs):
                print(row, flush=True)
        return
    for size in SIZES:
        count = max(3, min(10 * runs, runs * 10_000 // size))
        print(f"\nWith the noise-floor correction, {size:,} elements, {count} groups:\n")
        print("\n".join(table(size, count, True)))
    print(f"\nWithout the correction, 10,000 elements, {runs} groups:\n")
    print("\n".join(table(10_000, runs, False)))


if __name__ == "__main__":
    main()
