"""The method in float64, written in the simplest way: statistics, multipliers, phases, and the rules of a resumed run.

Written from the paper and docs/ only, without reading the product's code.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DEFAULTS: dict[str, Any] = {  # from docs/config.md
    "mode": "probe",
    "estimator": "damping",
    "unseen_rows": "exclude",
    "noise_floor_correction": True,
    "reference": "vo",
    "alpha_min": 0.1,
    "alpha_max": 10.0,
    "factors": None,
    "ramp": "linear",
    "granularity": "type",
    "recalibrate": None,
    "fixed_alphas": None,
    "weight_decay": "scaled",
}
MIN_VARIANCE_SHARE = 1 / 256  # mode "moments": s2 below this share of m^2 is rounding error (docs/method.md)
ALPHA_KEYS = (
    "samples", "mode", "estimator", "unseen_rows", "noise_floor_correction", "reference", "alpha_min", "alpha_max",
    "factors",
)  # fmt: skip
"""Keys of the measurement. A resumed run keeps the checkpoint's alphas, and warns if one of these keys differs."""
MEASUREMENT_KEYS = {*ALPHA_KEYS, "max_samples", "alpha_rtol", "accumulators"} - {"factors"}
"""Keys without effect beside "fixed_alphas", with which `factors` are refused."""
ROWS = ("embed_tokens", "lm_head", "word_embeddings", "output_layer")
"""Parameters with a row for each token."""


class AlphasUndefined(Exception):
    """The statistics give no multiplier."""


@dataclass
class Statistics:
    """Squared mean and variance of the gradient of each element of a group.

    Args:
        mu2: squared mean, (elements,).
        s2: variance, (elements,).
        shrink: factor that removes the bias of 1 / s2.
        floor: value of mu2 / s2 that noise alone gives.
        nonzero: number of elements with a gradient other than 0.
    """

    mu2: Tensor
    s2: Tensor
    shrink: float
    floor: float
    nonzero: int

    def value(self, estimator: str, corrected: bool) -> float:
        """SNR of the group, or its effective step d. NaN if no element has a variance above 0."""
        counted = self.s2 > 0
        mu2, s2 = self.mu2[counted], self.s2[counted]
        if not len(mu2):
            return math.nan
        shrink, floor = (self.shrink, self.floor) if corrected else (1.0, 0.0)
        if estimator == "pooled":
            return float((mu2.sum() - floor * s2.sum()) / s2.sum())
        snr = mu2 / s2 * shrink - floor
        if estimator == "mean":
            return float(snr.mean())
        if estimator == "median":
            ordered = snr.sort().values
            return float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        if estimator == "step_rms":
            steps = (mu2 - floor * s2) / (mu2 + s2 - floor * s2)
            return math.sqrt(max(0.0, float(steps.mean())))
        positive = snr.clamp(min=0)
        return float((positive / (1 + positive)).sqrt().mean())


def seen_row_mask(name: str, shape: torch.Size, seen_rows: Tensor | None) -> Tensor:
    """Elements that are measured, bool (numel,): not in the row of a token that did not occur.

    Args:
        seen_rows: tokens that occurred, bool (rows,). None: all.
    """
    mask = torch.ones(shape, dtype=torch.bool)
    if seen_rows is not None and name.split(".")[-2] in ROWS:
        mask[~seen_rows] = False
    return mask.flatten()


def statistics_of_samples(
    samples: Sequence[Mapping[str, Tensor]], groups: Mapping[str, str], seen_rows: Tensor | None
) -> dict[str, Statistics]:
    """Statistics of each group from K gradients of the measured parameters."""
    k, result = len(samples), {}
    for group in dict.fromkeys(groups.values()):
        names = [name for name, its in groups.items() if its == group]
        stacked = torch.stack([torch.cat([sample[name].flatten() for name in names]) for sample in samples]).double()
        nonzero = int((stacked != 0).any(0).sum())
        stacked = stacked[:, torch.cat([seen_row_mask(name, samples[0][name].shape, seen_rows) for name in names])]
        mu, s2 = stacked.mean(0), stacked.var(0, correction=1)
        shrink = (k - 3) / (k - 1) if k > 1 else 0.0
        result[group] = Statistics(mu**2, s2, shrink, 1 / k, nonzero)
    return result


def statistics_of_moments(
    moments: Mapping[str, tuple[Tensor, Tensor, int]],
    groups: Mapping[str, str],
    betas: tuple[float, float],
    seen_rows: Tensor | None,
) -> dict[str, Statistics]:
    """Statistics of each group from Adam's (m, v, number of updates) of each measured parameter."""
    result = {}
    for group in dict.fromkeys(groups.values()):
        parts, noise, nonzero = [], 0.0, 0
        for name in (name for name, its in groups.items() if its == group):
            m, v, t = moments[name]
            mask = seen_row_mask(name, m.shape, seen_rows)
            nonzero += int((v != 0).sum())
            weights = [(1 - betas[0]) * betas[0] ** (t - k) / (1 - betas[0] ** t) for k in range(1, t + 1)]
            noise = sum(weight**2 for weight in weights)
            m, v = m.double().flatten() / (1 - betas[0] ** t), v.double().flatten() / (1 - betas[1] ** t)
            s2 = v - m**2
            s2[s2 < MIN_VARIANCE_SHARE * m**2] = 0.0
            parts.append(torch.stack([m**2, s2 / (1 - noise)])[:, mask])
        mu2, s2 = torch.cat(parts, 1)
        result[group] = Statistics(mu2, s2, 1.0, noise, nonzero)
    return result


def alphas_of(statistics: Mapping[str, Statistics], section: Mapping[str, Any], corrected: bool) -> dict[str, float]:
    """alpha_m = sqrt(SNR_ref / SNR_m), or d_ref / d_m, within the bounds. 1 for `other` and for the reference."""
    values = {group: one.value(section["estimator"], corrected) for group, one in statistics.items()}
    reference = section["reference"]
    if reference == "max":
        scaled = {g: v for g, v in values.items() if g != "other" and not math.isnan(v)}
        if not scaled:
            raise AlphasUndefined
        reference = max(scaled, key=lambda group: scaled[group])
    if reference in values:
        level = values[reference]
    else:  # "layer_type": all layers of the reference type together
        parts = [one for group, one in statistics.items() if group.split(".")[0] == reference]
        joined = Statistics(
            torch.cat([one.mu2 for one in parts]), torch.cat([one.s2 for one in parts]),
            parts[0].shrink, parts[0].floor, 0,
        )  # fmt: skip
        level = joined.value(section["estimator"], corrected)
    if not level > 0:
        raise AlphasUndefined
    found = {}
    for group, value in values.items():
        if group in ("other", reference) or math.isnan(value):
            found[group] = 1.0
            continue
        if value <= 0 and section["alpha_max"] is None:
            raise AlphasUndefined
        ratio = math.inf if value <= 0 else level / value
        raw = ratio if section["estimator"] in ("damping", "step_rms") else math.sqrt(ratio)
        low, high = section["alpha_min"] or 0.0, section["alpha_max"] or math.inf
        found[group] = min(max(raw, low), high)
    return found


@dataclass
class ReferenceMols:
    """MoLS as its docs describe it: phases, samples and multipliers. `warnings`: parts of the expected messages."""

    section: dict[str, Any]
    groups: dict[str, str]  # module group of each measured and scaled parameter
    phase: str = "waiting"
    samples: list[dict[str, Tensor]] = field(default_factory=list)
    usable_samples: int = 0
    seen_rows: Tensor | None = None  # bool (rows,): tokens of the samples
    attempts: int = 0
    ended_at: int | None = None
    ramp_until: int = 0
    previous_alphas: dict[str, float] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    from_fixed_alphas: bool = False  # the alphas are fixed_alphas
    window_rng: Any = None  # random state of each rank in the probe window
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.section.get("fixed_alphas") and self.section.keys() & MEASUREMENT_KEYS:
            self.warnings.append('no effect beside "fixed_alphas"')
        self.section = {**DEFAULTS, **self.section}

    @property
    def discards(self) -> bool:
        return self.phase == "calibrating" and self.section["mode"] == "probe"

    def rates(self, t: int) -> dict[str, float]:
        """Multiplier of each module group in step t."""
        names = set(self.groups.values())
        if self.phase == "waiting":
            return dict.fromkeys(names, 1.0)
        if self.phase == "calibrating":
            return {g: self.previous_alphas.get(g, 1.0) for g in names}
        assert self.ended_at is not None
        if t >= self.ramp_until:
            f = 1.0
        elif t <= self.ended_at:
            f = 0.0
        else:
            f = (t - self.ended_at) / (self.ramp_until - self.ended_at)
            f = f if self.section["ramp"] == "linear" else (1 - math.cos(math.pi * f)) / 2
        old = {g: self.previous_alphas.get(g, 1.0) for g in names}
        return {g: old[g] + (self.alphas.get(g, 1.0) - old[g]) * f for g in names}

    def advance(self, t: int) -> None:
        """Change the phase, if due, before step t."""
        if self.phase == "ramping" and t >= self.ramp_until:
            self.phase = "fixed"
        recalibrate = self.section["recalibrate"]
        due = self.phase == "waiting" and t >= self.section["start"]
        due |= bool(
            self.phase == "fixed"
            and recalibrate
            and self.ended_at is not None
            and t >= self.ended_at + recalibrate["every"]
        )
        if not due:
            return
        late = self.phase == "waiting" and t > self.section["start"]
        self._begin(t)
        if self.section["fixed_alphas"] is not None:
            self._fix(t)
        elif late:
            self.warnings.append("is past mols.start")

    def _begin(self, t: int) -> None:
        self.previous_alphas = self.rates(t)
        self.phase, self.samples, self.usable_samples, self.attempts, self.seen_rows = "calibrating", [], 0, 0, None

    def _fix(self, t: int) -> None:
        fixed = self.section["fixed_alphas"]
        self.from_fixed_alphas = True
        self._end(t, {g: fixed.get(g, 1.0) for g in set(self.groups.values())})

    def _end(self, t: int, alphas: dict[str, float]) -> None:
        planned, start = self.section["ramp_end"], self.section["start"]
        if planned >= t:
            self.ramp_until = planned
        else:
            self.ramp_until = t + max(1, planned - start)
            self.warnings.append("after mols.ramp_end")
        self.alphas, self.ended_at, self.phase, self.samples = alphas, t, "ramping", []
        if t >= self.ramp_until:
            self.phase = "fixed"

    @property
    def _rows_to_measure(self) -> Tensor | None:
        return self.seen_rows if self.section["unseen_rows"] == "exclude" else None

    def sample(self, t: int, gradient: Mapping[str, Tensor] | None, tokens: Tensor) -> None:
        """Take a sample in mode "probe" or "online".

        Args:
            t: the next step.
            gradient: by name. None: the sample is not usable.
            tokens: tokens of the batches, bool (rows,).
        """
        if gradient is not None:
            self.seen_rows = tokens if self.seen_rows is None else self.seen_rows | tokens
            self.samples.append({name: gradient[name].clone() for name in self.groups})
        if self._count(t, gradient is not None):
            self._measure(t, statistics_of_samples(self.samples, self.groups, self._rows_to_measure))

    def moments(
        self,
        t: int,
        moments: Mapping[str, tuple[Tensor, Tensor, int]] | None,
        betas: tuple[float, float],
        before: Tensor,
    ) -> None:
        """Count a step in mode "moments".

        Args:
            moments: (m, v, number of updates) by name. None: the step was skipped.
            before: tokens that had moments before this step, bool (rows,).
        """
        if self._count(t, moments is not None) and moments is not None:
            self.seen_rows = before if bool(before.any()) else None
            own = {name: moments[name] for name in self.groups}
            self._measure(t, statistics_of_moments(own, self.groups, betas, self._rows_to_measure))

    def _count(self, t: int, usable: bool) -> bool:
        self.attempts += 1
        self.usable_samples += usable
        if not usable:
            self.warnings.append("is not finite (or its step was skipped)")
        wanted = self.section["samples"]
        if self.usable_samples >= wanted:
            return True
        if (self.attempts >= wanted and not self.usable_samples) or self.attempts >= 2 * wanted:
            self._fail(t)
        return False

    def _fail(self, t: int) -> None:
        self.warnings.append("the calibration failed")
        self.from_fixed_alphas = False
        self._end(t, self._factors if self.ended_at is None else self.rates(t))

    @property
    def _factors(self) -> dict[str, float]:
        given = self.section["factors"] or {}
        return {group: given.get(group, 1.0) for group in set(self.groups.values())}

    def _measure(self, t: int, statistics: Mapping[str, Statistics]) -> None:
        corrected = self.section["noise_floor_correction"]
        try:
            found = alphas_of(statistics, self.section, corrected)
        except AlphasUndefined:
            if not corrected:
                return self._fail(t)
            try:
                found = alphas_of(statistics, self.section, False)
            except AlphasUndefined:
                return self._fail(t)
            self.warnings.append("the alphas come from the uncorrected")
        bounds = [bound for bound in (self.section["alpha_min"], self.section["alpha_max"]) if bound is not None]
        self.warnings += ["hit its bound" for alpha in found.values() if alpha in bounds]
        self.warnings += ["had a gradient in any sample" for one in statistics.values() if one.nonzero == 0]
        self.from_fixed_alphas = False
        self._end(t, {group: alpha * self._factors.get(group, 1.0) for group, alpha in found.items()})
        return None

    # ------------------------------------------------------------------ checkpoints

    def state(self) -> dict[str, Any]:
        """The state in a checkpoint."""
        return copy.deepcopy({key: value for key, value in vars(self).items() if key not in ("groups", "warnings")})

    def resume(self, saved: Mapping[str, Any] | None, t: int) -> None:
        """Resume at step t by the rules of docs/checkpoints.md. None: a checkpoint without MoLS."""
        if saved is None:
            fresh = ReferenceMols(self.section, self.groups)
            self.__dict__.update({**vars(fresh), "warnings": [*self.warnings, "has no MoLS state"]})
            self.advance(t)
            return
        section, saved_section = self.section, saved["section"]
        kept = copy.deepcopy(dict(saved))
        lost = kept.pop("lost", False) and section["mode"] != "moments"
        if kept.pop("since", None) is not None:
            self.warnings.append("MoLS was off from step")
        self.__dict__.update({**kept, "section": section})
        self._warn_of_changed_keys(saved_section)
        fixed = section["fixed_alphas"]
        if self.phase != "waiting" and fixed is None and self.from_fixed_alphas:
            self.warnings.append("come from mols.fixed_alphas and stay")
        elif self.phase != "waiting" and fixed is not None:
            wanted = {g: fixed.get(g, 1.0) for g in set(self.groups.values())}
            if self.phase == "calibrating" or self.alphas != wanted:
                self.warnings.append("override the checkpoint's alphas")
                self._begin(t)
                self._fix(t)
        if self.phase == "calibrating" and self.usable_samples and (lost or saved_section["mode"] != section["mode"]):
            self.warnings.append("cannot be continued")
            previous_alphas = self.previous_alphas
            if self.ended_at is not None:  # a recalibration
                self._begin(t)
                self.previous_alphas = previous_alphas
            else:
                self.phase, self.samples, self.usable_samples, self.attempts, self.alphas = "waiting", [], 0, 0, {}
                self.seen_rows = None
            self.window_rng = None
        if self.phase != "calibrating":
            self.window_rng = None
        self.advance(t)

    def _warn_of_changed_keys(self, saved: Mapping[str, Any]) -> None:
        if self.section["fixed_alphas"] is not None or saved["fixed_alphas"] is not None:
            return
        calibrated, started = self.phase in ("ramping", "fixed"), self.phase != "waiting"
        for key in (*ALPHA_KEYS, "ramp_end"):
            if calibrated and saved[key] != self.section[key]:
                self.warnings.append(f"mols.{key} is")
        if started and saved["start"] != self.section["start"]:
            self.warnings.append("mols.start is")
