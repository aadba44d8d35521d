"""seed -> a life. Kinds of engines take turns, so that any run of seeds has them evenly."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from tests.lives.actions import (
    Action,
    Attach,
    BreakOptimizer,
    Detach,
    EditRate,
    Evaluate,
    Freeze,
    Life,
    Load,
    Save,
    Section,
    Setting,
    Step,
)

MEGATRON = {"engine": "megatron", "stage": -1, "split": True, "micros": 2}
KINDS: tuple[dict[str, Any], ...] = (
    {"stage": 0},
    {"stage": 1},
    {"stage": 2},
    {"stage": 3},
    {"stage": 3, "offload": True},
    {"stage": 2, "offload": True},
    {**MEGATRON, "ranks": 2, "grid": {"distributed": True}},
    {"stage": 0},
    {"stage": 1, "offload": True},
    {**MEGATRON, "ranks": 2, "grid": {"tp": 2, "distributed": True}},
    {"stage": 3},
    {**MEGATRON, "ranks": 3, "grid": {"distributed": False}},
    {"stage": 2},
    {**MEGATRON, "ranks": 2, "grid": {"pp": 2, "distributed": False}},
)
ACTIONS = 16
CHANGEABLE = (
    "alpha_max", "estimator", "unseen_rows", "reference", "mode",
    "samples", "ramp", "ramp_end", "recalibrate", "fixed_alphas", "start"
)  # fmt: skip
FREEZABLE = ("lm_head.weight", "layers.0.q_proj.weight", "layers.1.up_proj.weight")
FREEZABLE_IN_MEGATRON = ("output_layer.weight", "decoder.layers.1.mlp.linear_fc2.weight")


def draw(seed: int) -> Life:
    """The life of a seed."""
    dealer = _Dealer(seed)
    if seed % 25 == 24:
        return _measured_again(seed, dealer)
    return Life(seed, dealer.setting, dealer.actions())


def _measured_again(seed: int, dealer: _Dealer) -> Life:
    """Online windows one after the other: each begins at the multipliers of the one before."""
    more = {
        "mode": "online",
        "start": 1,
        "samples": 4,
        "ramp_end": 6,
        "recalibrate": {"every": 2},
        "fixed_alphas": None,
    }
    setting = dataclasses.replace(dealer.setting, section={**dealer.section(), **more})
    return Life(seed, setting, tuple(Step() for _ in range(16)))


class _Dealer:
    """Deals settings, sections and actions. Adam's moments, and a counter for a whole group, are twinned for weights
    that train throughout: there nothing is frozen."""

    def __init__(self, seed: int) -> None:
        self.dice = dice = random.Random(seed)
        kind = KINDS[seed % len(KINDS)]
        megatron = kind.get("engine") == "megatron"
        self.precision = dice.choices(("fp32", "bf16", "fp16"), (6, 2, 2))[0]
        names = ["adamw", "adam"] if megatron else ["adamw", "adamw", "adam", "sgd", "homemade"]
        if kind["stage"] in (0, 1, 2):  # at stage 3 a step of each sub-group would count
            names.append("grouped")
        self.optimizer = dice.choice(names)
        self.moments = self.optimizer in ("adamw", "adam") and dice.random() < 0.5
        self.freezes = not self.moments and self.optimizer != "grouped"
        self.granularity = dice.choice(("type", "type", "layer_type"))
        more: dict[str, Any] = {
            "precision": self.precision,
            "ranks": dice.choices((1, 2, 3), (2, 5, 3))[0],
            "micros": dice.choice((1, 2, 3)),
            "clip": dice.choice((0.0, 0.5, 100.0)),
            "optimizer": self.optimizer,
            "lr": 0.02 if self.optimizer == "sgd" else 0.01,
            "decay": dice.choice((0.0, 0.1, 1.0)) * (not (self.moments and self.optimizer == "adam")),  # L2 is refused
            "split": dice.random() < 0.7,
            "scheduled": dice.random() < 0.4,
            "section": self.section() if dice.random() < 0.9 else None,
        }
        self.setting = Setting(**{**more, **kind})

    # ------------------------------------------------------------------ sections

    def section(self, now: int = 0) -> Section:
        """A "mols" section whose phases are over soon after step `now`."""
        dice = self.dice
        mode = dice.choice(("probe", "probe", "online", *(("moments",) if self.moments else ())))
        corrected = dice.random() < 0.4
        start = now + dice.choice((0, 1, 2, 3))
        estimators = ("damping", "step_rms", "pooled", "median", *(("mean",) if self.precision == "fp32" else ()))
        section: Section = {
            "mode": mode,
            "start": max(start, 2) if mode == "moments" else start,
            "samples": dice.choice((4, 5)) if corrected else dice.choice((3, 4)),
            "noise_floor_correction": corrected,
            "estimator": dice.choice(estimators),
            "reference": dice.choice(("vo", "vo", "max", "qk")),
            "alpha_max": dice.choice((10.0, 1.3, None)),
            "alpha_min": dice.choice((0.1, 0.9)),
            "ramp": dice.choice(("linear", "cosine")),
            "unseen_rows": dice.choice(("exclude", "exclude", "include")),
            "granularity": self.granularity,
            "report_dir": "report",
        }
        section["ramp_end"] = section["start"] + dice.choice((1, 4, 8))
        if self.optimizer == "adamw" and dice.random() < 0.25:
            section["weight_decay"] = "unscaled"
        other = dice.random()
        if other < 0.2:
            section["fixed_alphas"] = self.fixed()
        elif other < 0.35:
            section["recalibrate"] = {"every": dice.choice((1, 2, 4))}
        return section

    def fixed(self) -> dict[str, float]:
        last = ".1" if self.granularity == "layer_type" else ""
        return {"embedding": 3.0, f"qk{last}": 0.5, f"mlp{last}": self.dice.choice((1.5, 2.5))}

    def changed(self, section: Section | None) -> Section | None:
        """The section of a run that resumes; None: without MoLS."""
        if section is None:
            return None if self.dice.random() < 0.5 else self.section()
        if self.dice.random() < 0.15:
            return None
        changed, fresh = dict(section), self.section()
        for key in self.dice.sample(CHANGEABLE, self.dice.choice((0, 1, 2))):
            if key == "fixed_alphas":
                changed[key] = None if changed.get(key) else self.fixed()
            elif key == "recalibrate":
                changed[key] = {"every": 3}
            elif key == "mode":
                changed[key] = "online" if section["mode"] == "probe" else "probe"
            elif key in ("samples", "ramp_end"):
                changed[key] += 1
            elif key == "start":
                changed[key] = max(0, changed[key] - 1)
            else:
                changed[key] = fresh[key]
        if changed.get("fixed_alphas"):
            changed["recalibrate"] = None
        return changed

    # ------------------------------------------------------------------ actions

    def actions(self) -> tuple[Action, ...]:
        dice, setting = self.dice, self.setting
        actions: list[Action] = []
        section, tags, count = setting.section, 0, dice.randint(ACTIONS, ACTIONS + 10)
        while len(actions) < count:
            what = dice.random()
            if what < 0.64:
                actions.append(self.step())
            elif what < 0.68:
                actions.append(Evaluate())
            elif what < 0.72:
                if self.freezes:
                    actions.append(Freeze(self.freezable(), dice.random() < 0.6))
            elif what < 0.80:
                actions.append(Save(f"tag{tags % 3}"))
                tags += 1
            elif what < 0.88:
                if tags:
                    fresh = dice.random() < 0.7
                    before, section = section, self.changed(section) if fresh else section
                    actions.append(Load(f"tag{dice.randrange(min(tags, 3))}", fresh, section))
                    if fresh and section is None and before is not None:  # off, and on again
                        section = before
                        actions += [self.step(), Save("off"), self.step(), Load("off", True, section)]
            elif what < 0.94:
                section = self.section(dice.choice((0, 4)))
                again: list[Action] = [Detach()] * (dice.random() < 0.8)
                again += [self.step()] * dice.choice((0, 1)) + [Attach(section)]
                if self.freezes and dice.random() < 0.4:  # frozen when MoLS is attached, and trained later
                    name = self.freezable()
                    again = [Freeze(name), *again, self.step(), Freeze(name, False), self.step(), self.step()]
                actions += again
            else:
                actions.append(EditRate(dice.choice((0.5, 2.0))))
        if setting.stage == 0 and setting.precision == "fp32" and setting.split and setting.optimizer == "adamw":
            given = {**self.section(), "fixed_alphas": self.fixed(), "recalibrate": None, "start": 0, "ramp_end": 1}
            actions += [Detach(), Attach(given), Step(), BreakOptimizer(dice.randrange(setting.ranks)), Step()]
        return tuple(actions)

    def freezable(self) -> str:
        return self.dice.choice(FREEZABLE if self.setting.engine == "deepspeed" else FREEZABLE_IN_MEGATRON)

    def step(self) -> Step:
        dice, ranks = self.dice, self.setting.replicas
        unused = (dice.randrange(2),) if dice.random() < 0.25 else ()
        on = (dice.randrange(ranks),) if unused and dice.random() < 0.5 else None
        return Step(unused, on, dice.randrange(ranks) if dice.random() < 0.12 else None)
