"""Bias and spread of every estimator on gradients with known SNR.

    python -m tests.tools.estimator_bias [--runs 200]        # docs/evidence/estimators.md has its output

The samples of an element are Gaussian with variance 1, so the mean and the sum of squared deviations of K samples are
drawn directly. The product's group sums and estimators read them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch

from mols_ds.core.estimators import ESTIMATORS, estimate
from mols_ds.core.group_stats import GroupSums, noise_floor
from mols_ds.core.schema import Estimator

MIXES: dict[str, Sequence[float]] = {
    "0": [0.0],
    "0.01": [0.01],
    "0.1": [0.1],
    "1": [1.0],
    "10": [10.0],
    "half 1, half 0": [0.0, 1.0],
    "1e-4 to 10, log-uniform": (10.0 ** np.linspace(-4, 1, 100)).tolist(),
}
"""Name -> SNR of the elements, each of equally many."""
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="groups of 10,000 elements; others in proportion")
    runs = parser.parse_args(arguments).runs
    for size in SIZES:
        count = max(3, min(10 * runs, runs * 10_000 // size))
        print(f"\nWith the noise-floor correction, {size:,} elements, {count} groups:\n")
        print("\n".join(table(size, count, True)))
    print(f"\nWithout the correction, 10,000 elements, {runs} groups:\n")
    print("\n".join(table(10_000, runs, False)))


if __name__ == "__main__":
    main()
