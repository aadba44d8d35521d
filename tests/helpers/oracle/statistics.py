"""Per-group statistics of K stacked gradients, float64, by the formulas of the paper and METHOD.md.

Everything is in memory at once: (K, elements) of one group. Only for tiny models.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.helpers.oracle.models import GROUPS, batch, loss_of

ESTIMATORS = ("mean", "median", "pooled", "damping", "step_rms")


def gradient_sample(
    model: nn.Module, iteration: int, ranks: int, micros: int, *, ranks_first: bool = False
) -> dict[str, Tensor]:
    """g_k: the gradient of the mean loss over all micro-batches of all ranks, before clipping, as fp32.

    It is summed in the model's dtype: each rank's micro-batches and then the ranks, as an engine does that reduces once
    a step, or the other way round (`ranks_first`), as one that reduces every micro-batch. Only in bf16 it matters.
    """
    total = {name: torch.zeros_like(p, requires_grad=False) for name, p in model.named_parameters()}
    outer, inner = (range(micros), range(ranks)) if ranks_first else (range(ranks), range(micros))
    for i in outer:
        part = {name: torch.zeros_like(p, requires_grad=False) for name, p in model.named_parameters()}
        for j in inner:
            micro, rank = (i, j) if ranks_first else (j, i)
            model.zero_grad()
            (loss_of(model, batch(iteration, micro, rank)) / micros).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    part[name] += parameter.grad / ranks if ranks_first else parameter.grad
        for name, sums in part.items():
            total[name] += sums if ranks_first else sums / ranks
    return {name: gradient.detach().float() for name, gradient in total.items()}


def tokens_of(iterations: Iterable[int], ranks: int, micros: int, rows: int) -> Tensor:
    """Which tokens occur in these iterations' batches: bool (rows,)."""
    seen = torch.zeros(rows, dtype=torch.bool)
    for iteration in iterations:
        for micro in range(micros):
            for rank in range(ranks):
                seen[batch(iteration, micro, rank).unique()] = True
    return seen


@contextlib.contextmanager
def bias_added_after_rounding() -> Iterator[None]:
    """`F.linear` rounds the product before it adds the bias, as ZeRO-3's linear does; a difference in bf16 only."""
    original = torch.nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = x.matmul(weight.t())
        return y if bias is None else y + bias

    torch.nn.functional.linear = linear
    try:
        yield
    finally:
        torch.nn.functional.linear = original


@dataclass(frozen=True, slots=True)
class GroupValues:
    """The statistics of one group. snr: SNR_i = mu_i^2 / s_i^2 of the counted elements (s_i^2 > 0), float64."""

    elements: int
    samples: int
    mu2: Tensor
    s2: Tensor
    never_moved: int
    moved_once: int
    unseen: int = 0

    @property
    def snr(self) -> Tensor:
        return self.mu2 / self.s2

    def looks_moved_once(self, rtol: float) -> int:
        """How many elements have SNR_i = 1/K within `rtol`: all that moved once, and a few others by chance."""
        return int(((self.snr * self.samples - 1).abs() <= rtol).sum())

    def corrected_snr(self) -> Tensor:
        """(K-3)/(K-1) * mu^2/s^2 - 1/K: unbiased, as K mu^2/s^2 is noncentral F(1, K-1) (METHOD)."""
        k = self.samples
        return (k - 3) / (k - 1) * self.snr - 1 / k

    def estimate(self, estimator: str, corrected: bool) -> float:
        """The group's value under one estimator; the median is the exact one (mean of the two middle elements)."""
        snr = self.corrected_snr() if corrected else self.snr
        if estimator == "mean":
            return float(snr.mean())
        if estimator == "median":
            return exact_median(snr)
        if estimator == "pooled":
            signal = self.mu2 - self.s2 / self.samples if corrected else self.mu2
            return float(signal.sum() / self.s2.sum())
        if estimator == "step_rms":
            ratio = self.snr
            floor = 1 / self.samples if corrected else 0.0
            return math.sqrt(max(0.0, float(((ratio - floor) / (ratio + 1 - floor)).mean())))
        if corrected:
            positive = snr.clamp(min=0.0)
            return float((positive / (1.0 + positive)).sqrt().mean())
        return float((self.mu2 / (self.mu2 + self.s2)).sqrt().mean())


def rows_of(tokens: Tensor | None, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Per parameter, which elements are in rows of tokens that occurred; all of them where rows are no tokens.

    tokens: bool (rows,); None: every row counts.
    """
    kept = {name: torch.ones_like(mask, dtype=torch.bool) for name, mask in masks.items()}
    for name, mask in masks.items():
        whole = bool((mask == GROUPS.index("embedding")).all()) or bool((mask == GROUPS.index("head")).all())
        if tokens is not None and whole and mask.ndim == 2 and len(mask) == len(tokens):
            kept[name] &= tokens[:, None]
    return kept


def group_values(
    samples: Sequence[Mapping[str, Tensor]], masks: Mapping[str, Tensor], tokens: Tensor | None = None
) -> dict[str, GroupValues]:
    """The values of each group that the model has, from K gradient samples.

    tokens: bool (rows,), which tokens occurred; rows of the others are in no value. None: every row counts.
    """
    result, kept = {}, rows_of(tokens, masks)
    for index, group in enumerate(GROUPS):
        stacked = torch.stack(
            [torch.cat([sample[name][mask == index] for name, mask in masks.items()]) for sample in samples]
        ).double()
        if not stacked.shape[1]:
            continue
        seen = torch.cat([kept[name][mask == index] for name, mask in masks.items()])
        mu, s2 = stacked.mean(dim=0), stacked.var(dim=0, correction=1)
        counted, moves = (s2 > 0) & seen, (stacked != 0).sum(dim=0)
        result[group] = GroupValues(
            elements=stacked.shape[1],
            samples=len(samples),
            mu2=mu[counted] ** 2,
            s2=s2[counted],
            never_moved=int((moves == 0).sum()),
            moved_once=int(((moves == 1) & seen).sum()),
            unseen=int((~seen).sum()),
        )
    return result


def exact_median(values: Tensor) -> float:
    ordered, n = values.sort().values, values.numel()
    return float(ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def alphas(values: Mapping[str, float], reference: str, *, steps: bool, low: float, high: float) -> dict[str, float]:
    """alpha_m = sqrt(SNR_ref / SNR_m), or d_ref / d_m for effective steps; `other` stays 1; clamped to [low, high]."""
    result = {}
    for group, value in values.items():
        if group == "other":
            result[group] = 1.0
            continue
        ratio = math.inf if value <= 0 else values[reference] / value
        result[group] = min(max(ratio if steps else math.sqrt(ratio), low), high)
    return result
