"""Replicates of a calibration from half samples (`mols_ds.core.replicates`), one element at a time."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import polygamma


def replicates(gradients: np.ndarray, halves: np.ndarray) -> dict[str, np.ndarray]:
    """Name of a value -> (replicates, elements), from (samples, elements) and the cells in half A.

    Sample k is in cell k mod the number of cells.
    """
    k, n = gradients.shape
    m, s2 = gradients.mean(0), gradients.var(0, ddof=1)
    size = 1 / (m**2 + (1 - 1 / k) * s2)
    signal = [((m[i] ** 2 - s2[i] / k) * size[i]) for i in range(n)]
    damped = [m[i] ** 4 / (m[i] ** 2 + s2[i] / k) * size[i] for i in range(n)]
    factor = min(1.0, max(0.0, sum(signal) / sum(damped)))
    true = [m[i] * math.sqrt(factor * m[i] ** 2 / (m[i] ** 2 + s2[i] / k)) for i in range(n)]
    pilot = np.sort(m**2 / s2)[(n - 1) // 2]
    found: dict[str, list[list[float]]] = {}
    for half in halves:
        in_a = np.array([half[sample % len(half)] == 1 for sample in range(k)])
        a, b = gradients[in_a], gradients[~in_a]
        var_a, var_b = a.var(0, ddof=1), b.var(0, ddof=1)
        root = math.sqrt(len(a) * len(b)) / k
        common = 1 + sum((var_a[i] - var_b[i]) / s2[i] for i in range(n)) / (2 * n)
        summed = 1 + sum(var_a - var_b) / (2 * sum(s2))
        shift = math.log(sum(var_a / s2) / sum(var_b / s2))
        tilt = root / k * sum((var_a - var_b) * size) / sum(m**2 * size)
        width = math.sqrt(float(polygamma(1, (len(a) - 1) / 2) + polygamma(1, (len(b) - 1) / 2)))
        rows: dict[str, list[float]] = {}
        for i in range(n):
            error = (a[:, i].mean() - b[:, i].mean()) * root - tilt * m[i]
            z = (math.log((var_a[i] + 0.01 * s2[i]) / (var_b[i] + 0.01 * s2[i])) - shift) / width
            part = 2 / (9 * (k - 1))
            variance = s2[i] * common * max(0.4, 1 - part + z * math.sqrt(part)) ** 3
            square = (true[i] + error * math.sqrt(common)) ** 2
            ratio = square / variance
            snr = max(0.0, (k - 3) / (k - 1) * ratio - 1 / k)
            values = {
                "snr": ratio,
                "mu2": (true[i] + error * math.sqrt(summed)) ** 2,
                "s2": s2[i] + (var_a[i] - var_b[i]) / 2,
                "damping": math.sqrt(square / (square + variance)),
                "damping_corrected": math.sqrt(snr / (1 + snr)),
                "step2": square / (square + variance),
                "step2_corrected": (square - variance / k) / (square + (1 - 1 / k) * variance),
                "below": float(ratio <= pilot),
            }
            for name, value in values.items():
                rows.setdefault(name, []).append(value)
        for name, row in rows.items():
            found.setdefault(name, []).append(row)
    return {name: np.array(values) for name, values in found.items()}
