"""SGG around Adam, slow and plain: numpy, whole parameters, sorted medians. Source: arXiv 2506.01049, algorithm 1.

With the choices that mols_ds/optim/sgg.py lists: clusters of m by K-means, D over all elements of the model, lower
medians, and the clusters of step t used from step t + 1 on.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from tests.helpers.oracle.adam_mini import Settings

EPSILON = 1e-8


def lower_median(values: np.ndarray) -> float:
    return float(np.sort(values)[(len(values) - 1) // 2])


def labels_of(values: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Nearest centre; the lower one of two that are equally near."""
    return np.argmin(np.abs(values[:, None] - centers[None, :]), axis=1)


def k_means(values: np.ndarray, centers: np.ndarray, rounds: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """(labels, centres) of Lloyd's iteration from `centers`; an empty cluster keeps its centre."""
    centers = centers.copy()
    before = None
    for _ in range(rounds):
        labels = labels_of(values, centers)
        if before is not None and np.array_equal(labels, before):
            break
        before = labels
        for c in range(len(centers)):
            if np.any(labels == c):
                centers[c] = values[labels == c].mean()
    return labels_of(values, centers), centers


class SlowSGG:
    """The state of one run over the parameters of `model`, which `step` updates."""

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        *,
        clusters: int,
        interval: int,
        beta3: float,
        bounds: tuple[float, float] = (0.1, 10.0),
    ) -> None:
        self.model, self.settings, self.steps = model, settings, 0
        self.clusters, self.interval, self.beta3, self.bounds = clusters, interval, beta3, bounds
        names = [name for name, _ in model.named_parameters()]
        self.m = {name: np.zeros(p.numel()) for name, p in model.named_parameters()}
        self.v = {name: np.zeros(p.numel()) for name, p in model.named_parameters()}
        self.labels = {name: np.zeros(p.numel(), dtype=int) for name, p in model.named_parameters()}
        self.scales = {name: np.ones(clusters) for name in names}
        self.centers: dict[str, np.ndarray] = {}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor]) -> None:
        s = self.settings
        self.steps += 1
        for name, p in self.model.named_parameters():
            g = gradients[name].double().numpy().reshape(-1)
            self.m[name] = s.beta1 * self.m[name] + (1 - s.beta1) * g
            self.v[name] = s.beta2 * self.v[name] + (1 - s.beta2) * g * g
            m_hat = self.m[name] / (1 - s.beta1**self.steps)
            v_hat = self.v[name] / (1 - s.beta2**self.steps)
            w = p.double().numpy().reshape(-1) * (1 - s.rate(p) * s.decay_of(p))
            scale = self.scales[name][self.labels[name]]
            w -= s.rate(p) * scale * m_hat / (np.sqrt(v_hat) + s.eps)
            p.copy_(torch.from_numpy(w).view(p.shape))
        if self.steps % self.interval == 0:
            self._cluster()

    def _cluster(self) -> None:
        deviations = {name: np.abs(m - m.mean()) for name, m in self.m.items()}
        typical = lower_median(np.concatenate(list(deviations.values())))
        for name, m in self.m.items():
            first = m.mean() + m.std() * np.linspace(-1.5, 1.5, self.clusters)
            self.labels[name], self.centers[name] = k_means(m, self.centers.get(name, first))
            for c in range(self.clusters):
                chosen = deviations[name][self.labels[name] == c]
                if len(chosen):
                    ratio = np.clip(typical / (lower_median(chosen) + EPSILON), *self.bounds)
                    self.scales[name][c] = self.beta3 * self.scales[name][c] + (1 - self.beta3) * ratio
