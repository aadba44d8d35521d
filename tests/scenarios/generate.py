"""Generates the scenario of a seed. The seeds use the engines in turn, so any range of seeds covers them evenly."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from tests.scenarios.scenario import (
    Action,
    Attach,
    BreakOptimizer,
    Detach,
    EditRate,
    Evaluate,
    Freeze,
    Load,
    RunSettings,
    Save,
    Scenario,
    Section,
    Step,
)

MEGATRON = {"engine": "megatron", "stage": -1, "split": True, "micros": 2}
ENGINES: tuple[dict[str, Any], ...] = (
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
MIN_ACTIONS = 16
CHANGEABLE = (
    "alpha_max", "factors", "estimator", "unseen_rows", "reference", "mode",
    "samples", "ramp", "ramp_end", "recalibrate", "fixed_alphas", "start"
)  # fmt: skip
FREEZABLE = ("lm_head.weight", "layers.0.q_proj.weight", "layers.1.up_proj.weight")
FREEZABLE_IN_MEGATRON = ("output_layer.weight", "decoder.layers.1.mlp.linear_fc2.weight")


def generate(seed: int) -> Scenario:
    """The scenario of a seed: settings and actions. The same seed gives the same scenario."""
    generator = _ScenarioGenerator(seed)
    if seed % 25 == 24:
        return _repeated_online(seed, generator)
    return Scenario(seed, generator.settings, generator.actions())


def _repeated_online(seed: int, generator: _ScenarioGenerator) -> Scenario:
    """Repeated online calibrations: each starts at the multipliers of the one before."""
    more = {
        "mode": "online",
        "start": 1,
        "samples": 4,
        "ramp_end": 6,
        "recalibrate": {"every": 2},
        "fixed_alphas": None,
    }
    settings = dataclasses.replace(generator.settings, section={**generator.section(), **more})
    return Scenario(seed, settings, tuple(Step() for _ in range(16)))


class _ScenarioGenerator:
    """Draws settings, sections and actions.

    The reference models Adam's moments, and a step counter per parameter group, only for weights that train in every
    step. Scenarios with either freeze nothing.
    """

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        engine = ENGINES[seed % len(ENGINES)]
        megatron = engine.get("engine") == "megatron"
        self.precision = rng.choices(("fp32", "bf16", "fp16"), (6, 2, 2))[0]
        names = ["adamw", "adam"] if megatron else ["adamw", "adamw", "adam", "sgd", "custom"]
        if engine["stage"] in (0, 1, 2):  # at stage 3 the step of each sub-group would increase the counter
            names.append("fused_adam")
        self.optimizer = rng.choice(names)
        self.moments = self.optimizer in ("adamw", "adam") and rng.random() < 0.5
        self.freezes = not self.moments and self.optimizer != "fused_adam"
        self.granularity = rng.choice(("type", "type", "layer_type"))
        more: dict[str, Any] = {
            "precision": self.precision,
            "ranks": rng.choices((1, 2, 3), (2, 5, 3))[0],
            "micros": rng.choice((1, 2, 3)),
            "clip": rng.choice((0.0, 0.5, 100.0)),
            "optimizer": self.optimizer,
            "lr": 0.02 if self.optimizer == "sgd" else 0.01,
            # mode "moments" refuses L2 regularization
            "decay": rng.choice((0.0, 0.1, 1.0)) * (not (self.moments and self.optimizer == "adam")),
            "split": rng.random() < 0.7,
            "scheduled": rng.random() < 0.4,
            "section": self.section() if rng.random() < 0.9 else None,
        }
        self.settings = RunSettings(**{**more, **engine})

    # ------------------------------------------------------------------ sections

    def section(self, now: int = 0) -> Section:
        """A "mols" section whose calibration and ramp end soon after step `now`."""
        rng = self.rng
        mode = rng.choice(("probe", "probe", "online", *(("moments",) if self.moments else ())))
        corrected = rng.random() < 0.4
        start = now + rng.choice((0, 1, 2, 3))
        estimators = ("damping", "step_rms", "pooled", "median", *(("mean",) if self.precision == "fp32" else ()))
        section: Section = {
            "mode": mode,
            "start": max(start, 2) if mode == "moments" else start,
            "samples": rng.choice((4, 5)) if corrected else rng.choice((3, 4)),
            "noise_floor_correction": corrected,
            "estimator": rng.choice(estimators),
            "reference": rng.choice(("vo", "vo", "max", "qk")),
            "alpha_max": rng.choice((10.0, 1.3, None)),
            "alpha_min": rng.choice((0.1, 0.9)),
            "ramp": rng.choice(("linear", "cosine")),
            "unseen_rows": rng.choice(("exclude", "exclude", "include")),
            "granularity": self.granularity,
            "report_dir": "report",
        }
        section["ramp_end"] = section["start"] + rng.choice((1, 4, 8))
        if self.optimizer == "adamw" and rng.random() < 0.25:
            section["weight_decay"] = "unscaled"
        draw = rng.random()
        if draw < 0.2:
            section["fixed_alphas"] = self.fixed_alphas()
        elif draw < 0.35:
            section["recalibrate"] = {"every": rng.choice((1, 2, 4))}
        with_factors = random.Random(str(section)).random() < 0.3  # a draw of its own: the rest of a seed stays
        section["factors"] = self.factors() if with_factors and "fixed_alphas" not in section else None
        return section

    def factors(self) -> dict[str, float]:
        return {"embedding": 3.0, "mlp.1" if self.granularity == "layer_type" else "mlp": 0.5}

    def fixed_alphas(self) -> dict[str, float]:
        last = ".1" if self.granularity == "layer_type" else ""
        return {"embedding": 3.0, f"qk{last}": 0.5, f"mlp{last}": self.rng.choice((1.5, 2.5))}

    def changed_section(self, section: Section | None) -> Section | None:
        """The section of a resumed run. None: without MoLS."""
        if section is None:
            return None if self.rng.random() < 0.5 else self.section()
        if self.rng.random() < 0.15:
            return None
        changed, fresh = dict(section), self.section()
        for key in self.rng.sample(CHANGEABLE, self.rng.choice((0, 1, 2))):
            if key == "fixed_alphas":
                changed[key] = None if changed.get(key) else self.fixed_alphas()
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
            changed["recalibrate"] = changed["factors"] = None
        return changed

    # ------------------------------------------------------------------ actions

    def actions(self) -> tuple[Action, ...]:
        rng, settings = self.rng, self.settings
        actions: list[Action] = []
        section, tags, count = settings.section, 0, rng.randint(MIN_ACTIONS, MIN_ACTIONS + 10)
        while len(actions) < count:
            draw = rng.random()
            if draw < 0.64:
                actions.append(self.step())
            elif draw < 0.68:
                actions.append(Evaluate())
            elif draw < 0.72:
                if self.freezes:
                    actions.append(Freeze(self.freezable_name(), rng.random() < 0.6))
            elif draw < 0.80:
                actions.append(Save(f"tag{tags % 3}"))
                tags += 1
            elif draw < 0.88:
                if tags:
                    fresh = rng.random() < 0.7
                    before, section = section, self.changed_section(section) if fresh else section
                    actions.append(Load(f"tag{rng.randrange(min(tags, 3))}", fresh, section))
                    if (
                        fresh and section is None and before is not None
                    ):  # also save and load without MoLS, then enable it again
                        section = before
                        actions += [self.step(), Save("off"), self.step(), Load("off", True, section)]
            elif draw < 0.94:
                section = self.section(rng.choice((0, 4)))
                reattach: list[Action] = [Detach()] * (rng.random() < 0.8)
                reattach += [self.step()] * rng.choice((0, 1)) + [Attach(section)]
                if self.freezes and rng.random() < 0.4:  # frozen while MoLS is attached, trained later
                    name = self.freezable_name()
                    reattach = [Freeze(name), *reattach, self.step(), Freeze(name, False), self.step(), self.step()]
                actions += reattach
            else:
                actions.append(EditRate(rng.choice((0.5, 2.0))))
        if settings.stage == 0 and settings.precision == "fp32" and settings.split and settings.optimizer == "adamw":
            last = self.section()
            last |= {"fixed_alphas": self.fixed_alphas(), "recalibrate": None, "factors": None}
            last |= {"start": 0, "ramp_end": 1}
            actions += [Detach(), Attach(last), Step(), BreakOptimizer(rng.randrange(settings.ranks))]
            actions.append(Step())
        return tuple(actions)

    def freezable_name(self) -> str:
        return self.rng.choice(FREEZABLE if self.settings.engine == "deepspeed" else FREEZABLE_IN_MEGATRON)

    def step(self) -> Step:
        rng, ranks = self.rng, self.settings.replicas
        unused = (rng.randrange(2),) if rng.random() < 0.25 else ()
        on = (rng.randrange(ranks),) if unused and rng.random() < 0.5 else None
        return Step(unused, on, rng.randrange(ranks) if rng.random() < 0.12 else None)
