"""The method by METHOD.md, float64 and naive: statistics, multipliers, phases, and who wins at resume.

Written without a look at the product's own: what the two have in common is the paper and docs/.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DEFAULTS: dict[str, Any] = {  # of docs/deepspeed.md
    "mode": "probe",
    "estimator": "damping",
    "unseen_rows": "exclude",
    "noise_floor_correction": True,
    "reference": "vo",
    "alpha_min": 0.1,
    "alpha_max": 10.0,
    "ramp": "linear",
    "granularity": "type",
    "recalibrate": None,
    "fixed_alphas": None,
    "weight_decay": "scaled",
}
CUT = 1 / 256  # mode "moments": below this share of m^2 the noise is lost in rounding (docs/method.md)
OF_THE_ALPHAS = (
    "samples", "mode", "estimator", "unseen_rows", "noise_floor_correction", "reference", "alpha_min", "alpha_max"
)  # fmt: skip
ROWS = ("embed_tokens", "lm_head", "word_embeddings", "output_layer")
"""Parameters with a row for each token."""
"""Keys that say how alphas are measured: a resumed run whose checkpoint has alphas keeps them, and says so."""


class NoAlphas(Exception):
    """No multiplier can be formed."""


@dataclass
class Statistics:
    """mu^2 and s^2 of a group's elements, and what noise alone reads: (shrink, floor)."""

    mu2: Tensor
    s2: Tensor
    shrink: float
    floor: float
    moved: int

    def value(self, estimator: str, corrected: bool) -> float:
        """SNR of the group, or the mean step d; NaN where no element counts."""
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


def in_seen_rows(name: str, shape: torch.Size, seen: Tensor | None) -> Tensor:
    """Bool (numel,): elements that are not in the row of a token that did not occur. seen: bool (rows,), None: all."""
    mask = torch.ones(shape, dtype=torch.bool)
    if seen is not None and name.split(".")[-2] in ROWS:
        mask[~seen] = False
    return mask.flatten()


def of_samples(
    samples: Sequence[Mapping[str, Tensor]], groups: Mapping[str, str], seen: Tensor | None
) -> dict[str, Statistics]:
    """From K gradients of the measured parameters, by group."""
    k, result = len(samples), {}
    for group in dict.fromkeys(groups.values()):
        names = [name for name, its in groups.items() if its == group]
        stacked = torch.stack([torch.cat([sample[name].flatten() for name in names]) for sample in samples]).double()
        moved = int((stacked != 0).any(0).sum())
        stacked = stacked[:, torch.cat([in_seen_rows(name, samples[0][name].shape, seen) for name in names])]
        mu, s2 = stacked.mean(0), stacked.var(0, correction=1)
        shrink = (k - 3) / (k - 1) if k > 1 else 0.0
        result[group] = Statistics(mu**2, s2, shrink, 1 / k, moved)
    return result


def of_moments(
    moments: Mapping[str, tuple[Tensor, Tensor, int]],
    groups: Mapping[str, str],
    betas: tuple[float, float],
    seen: Tensor | None,
) -> dict[str, Statistics]:
    """From Adam's (m, v, number of updates) of each measured parameter, by group."""
    result = {}
    for group in dict.fromkeys(groups.values()):
        parts, noise, moved = [], 0.0, 0
        for name in (name for name, its in groups.items() if its == group):
            m, v, t = moments[name]
            mask = in_seen_rows(name, m.shape, seen)
            moved += int((v != 0).sum())
            weights = [(1 - betas[0]) * betas[0] ** (t - k) / (1 - betas[0] ** t) for k in range(1, t + 1)]
            noise = sum(weight**2 for weight in weights)
            m, v = m.double().flatten() / (1 - betas[0] ** t), v.double().flatten() / (1 - betas[1] ** t)
            s2 = v - m**2
            s2[s2 < CUT * m**2] = 0.0
            parts.append(torch.stack([m**2, s2 / (1 - noise)])[:, mask])
        mu2, s2 = torch.cat(parts, 1)
        result[group] = Statistics(mu2, s2, 1.0, noise, moved)
    return result


def alphas_of(statistics: Mapping[str, Statistics], section: Mapping[str, Any], corrected: bool) -> dict[str, float]:
    """alpha_m = sqrt(SNR_ref / SNR_m), or d_ref / d_m; bounded; 1 for `other` and the reference."""
    values = {group: one.value(section["estimator"], corrected) for group, one in statistics.items()}
    reference = section["reference"]
    if reference == "max":
        scaled = {g: v for g, v in values.items() if g != "other" and not math.isnan(v)}
        if not scaled:
            raise NoAlphas
        reference = max(scaled, key=lambda group: scaled[group])
    if reference in values:
        level = values[reference]
    else:  # the union of its layers
        parts = [one for group, one in statistics.items() if group.split(".")[0] == reference]
        joined = Statistics(
            torch.cat([one.mu2 for one in parts]), torch.cat([one.s2 for one in parts]),
            parts[0].shrink, parts[0].floor, 0,
        )  # fmt: skip
        level = joined.value(section["estimator"], corrected)
    if not level > 0:
        raise NoAlphas
    found = {}
    for group, value in values.items():
        if group in ("other", reference) or math.isnan(value):
            found[group] = 1.0
            continue
        if value <= 0 and section["alpha_max"] is None:
            raise NoAlphas
        ratio = math.inf if value <= 0 else level / value
        raw = ratio if section["estimator"] in ("damping", "step_rms") else math.sqrt(ratio)
        low, high = section["alpha_min"] or 0.0, section["alpha_max"] or math.inf
        found[group] = min(max(raw, low), high)
    return found


@dataclass
class Mols:
    """MoLS by its docs: phases, samples and multipliers. `said`: what has to be warned of, in short."""

    section: dict[str, Any]
    groups: dict[str, str]  # parameter that is measured and scaled -> its module group
    phase: str = "waiting"
    samples: list[dict[str, Tensor]] = field(default_factory=list)
    counted: int = 0
    seen: Tensor | None = None  # bool (rows,): tokens of the samples
    attempts: int = 0
    ended_at: int | None = None
    ramp_until: int = 0
    old: dict[str, float] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    given: bool = False  # the alphas came from fixed_alphas
    window: Any = None  # where each rank's stream of random numbers of a probe window goes on
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.section = {**DEFAULTS, **self.section}

    @property
    def discards(self) -> bool:
        return self.phase == "calibrating" and self.section["mode"] == "probe"

    def rates(self, t: int) -> dict[str, float]:
        """Module group -> multiplier of step t."""
        names = set(self.groups.values())
        if self.phase == "waiting":
            return dict.fromkeys(names, 1.0)
        if self.phase == "calibrating":
            return {g: self.old.get(g, 1.0) for g in names}
        assert self.ended_at is not None
        if t >= self.ramp_until:
            f = 1.0
        elif t <= self.ended_at:
            f = 0.0
        else:
            f = (t - self.ended_at) / (self.ramp_until - self.ended_at)
            f = f if self.section["ramp"] == "linear" else (1 - math.cos(math.pi * f)) / 2
        return {g: self.old.get(g, 1.0) + (self.alphas.get(g, 1.0) - self.old.get(g, 1.0)) * f for g in names}

    def advance(self, t: int) -> None:
        """Before step t."""
        if self.phase == "ramping" and t >= self.ramp_until:
            self.phase = "fixed"
        again = self.section["recalibrate"]
        due = self.phase == "waiting" and t >= self.section["start"]
        due |= bool(
            self.phase == "fixed" and again and self.ended_at is not None and t >= self.ended_at + again["every"]
        )
        if not due:
            return
        late = self.phase == "waiting" and t > self.section["start"]
        self._begin(t)
        if self.section["fixed_alphas"] is not None:
            self._fix(t)
        elif late:
            self.said.append("is past mols.start")

    def _begin(self, t: int) -> None:
        self.old = self.rates(t)
        self.phase, self.samples, self.counted, self.attempts, self.seen = "calibrating", [], 0, 0, None

    def _fix(self, t: int) -> None:
        fixed = self.section["fixed_alphas"]
        self.given = True
        self._end(t, {g: fixed.get(g, 1.0) for g in set(self.groups.values())})

    def _end(self, t: int, alphas: dict[str, float]) -> None:
        planned, start = self.section["ramp_end"], self.section["start"]
        if planned >= t:
            self.ramp_until = planned
        else:
            self.ramp_until = t + max(1, planned - start)
            self.said.append("after mols.ramp_end")
        self.alphas, self.ended_at, self.phase, self.samples = alphas, t, "ramping", []
        if t >= self.ramp_until:
            self.phase = "fixed"

    @property
    def _excluded(self) -> Tensor | None:
        return self.seen if self.section["unseen_rows"] == "exclude" else None

    def sample(self, t: int, gradient: Mapping[str, Tensor] | None, tokens: Tensor) -> None:
        """One attempted sample of modes "probe" and "online"; None: not usable. `t`: the step that comes next.
        tokens: bool (rows,), those of its batches."""
        if gradient is not None:
            self.seen = tokens if self.seen is None else self.seen | tokens
            self.samples.append({name: gradient[name].clone() for name in self.groups})
        if self._count(t, gradient is not None):
            self._measure(t, of_samples(self.samples, self.groups, self._excluded))

    def moments(
        self,
        t: int,
        moments: Mapping[str, tuple[Tensor, Tensor, int]] | None,
        betas: tuple[float, float],
        before: Tensor,
    ) -> None:
        """One step of mode "moments"; None: it was skipped. before: bool (rows,), tokens that had moments."""
        if self._count(t, moments is not None) and moments is not None:
            self.seen = before if bool(before.any()) else None
            own = {name: moments[name] for name in self.groups}
            self._measure(t, of_moments(own, self.groups, betas, self._excluded))

    def _count(self, t: int, usable: bool) -> bool:
        self.attempts += 1
        self.counted += usable
        if not usable:
            self.said.append("is not finite (or its step was skipped)")
        wanted = self.section["samples"]
        if self.counted >= wanted:
            return True
        if (self.attempts >= wanted and not self.counted) or self.attempts >= 2 * wanted:
            self._give_up(t)
        return False

    def _give_up(self, t: int) -> None:
        self.said.append("the calibration failed")
        self.given = False
        self._end(t, {g: self.old.get(g, 1.0) for g in set(self.groups.values())})

    def _measure(self, t: int, statistics: Mapping[str, Statistics]) -> None:
        corrected = self.section["noise_floor_correction"]
        try:
            found = alphas_of(statistics, self.section, corrected)
        except NoAlphas:
            if not corrected:
                return self._give_up(t)
            try:
                found = alphas_of(statistics, self.section, False)
            except NoAlphas:
                return self._give_up(t)
            self.said.append("the alphas come from the uncorrected")
        bounds = [bound for bound in (self.section["alpha_min"], self.section["alpha_max"]) if bound is not None]
        self.said += ["hit its bound" for alpha in found.values() if alpha in bounds]
        self.said += ["had a gradient in any sample" for one in statistics.values() if one.moved == 0]
        self.given = False
        self._end(t, found)
        return None

    # ------------------------------------------------------------------ checkpoints

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return copy.deepcopy({key: value for key, value in vars(self).items() if key not in ("groups", "said")})

    def resume(self, saved: Mapping[str, Any] | None, t: int) -> None:
        """Go on at step t by the rules of docs/checkpoints.md."""
        if saved is None:
            fresh = Mols(self.section, self.groups)
            self.__dict__.update({**vars(fresh), "said": [*self.said, "has no MoLS state"]})
            self.advance(t)
            return
        section, was = self.section, saved["section"]
        kept = copy.deepcopy(dict(saved))
        lost = kept.pop("lost", False) and section["mode"] != "moments"
        if kept.pop("since", None) is not None:
            self.said.append("MoLS was off from step")
        self.__dict__.update({**kept, "section": section})
        self._say_changes(was)
        fixed = section["fixed_alphas"]
        if self.phase != "waiting" and fixed is None and self.given:
            self.said.append("come from mols.fixed_alphas and stay")
        elif self.phase != "waiting" and fixed is not None:
            wanted = {g: fixed.get(g, 1.0) for g in set(self.groups.values())}
            if self.phase == "calibrating" or self.alphas != wanted:
                self.said.append("override the checkpoint's alphas")
                self._begin(t)
                self._fix(t)
        if self.phase == "calibrating" and self.counted and (lost or was["mode"] != section["mode"]):
            self.said.append("cannot be continued")
            again, old = self.ended_at is not None, (self.ended_at, self.old)
            if again:
                self._begin(t)
                self.old = old[1]
            else:
                self.phase, self.samples, self.counted, self.attempts, self.alphas = "waiting", [], 0, 0, {}
                self.seen = None
            self.window = None
        if self.phase != "calibrating":
            self.window = None
        self.advance(t)

    def _say_changes(self, was: Mapping[str, Any]) -> None:
        if self.section["fixed_alphas"] is not None or was["fixed_alphas"] is not None:
            return
        over, begun = self.phase in ("ramping", "fixed"), self.phase != "waiting"
        for key in (*OF_THE_ALPHAS, "ramp_end"):
            if over and was[key] != self.section[key]:
                self.said.append(f"mols.{key} is")
        if begun and was["start"] != self.section["start"]:
            self.said.append("mols.start is")
