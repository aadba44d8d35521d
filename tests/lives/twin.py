"""The twin: one process, plain torch, no engine. It says what has to be seen after each action of a life."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.helpers.digests import digest
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
    Step,
)
from tests.lives.method import Mols
from tests.lives.model import batch, group_of, random_state, tiny
from tests.lives.optimizer import BETAS, FP16_POWER, PlainOptimizer, Scale, clip_factor
from tests.lives.seen import Seen

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VECTOR_FACTOR = 2.0  # base rate of the vectors relative to the matrices', with two parameter groups
GUARDED = 2  # scaled steps in which an optimizer that leaves tensors out is noticed


def schedule(step: int) -> float:
    """The scheduler's factor on each base rate."""
    return min((step + 1) / 3, 1.0) * 0.97**step


class Twin:
    """All that a run holds. `play` acts; actions that would not be legal at that point become legal ones."""

    embedding = "embed_tokens.weight"

    def __init__(self, life: Life) -> None:
        self.seed, self.setting = life.seed, life.setting
        self.checkpoints: dict[str, Any] = {}
        self.batches = self.starts = 0
        self.mols: Mols | None = None
        self.over = False
        self.applied: dict[str, float] = {}
        self.said: list[str] = []
        self.off, self.kept = False, (None, None)
        self._build()
        self._reseed()
        if self.setting.section is not None:
            self._attach(self.setting.section, 0)
        else:
            self._switch_off()

    # ------------------------------------------------------------------ build

    def _build(self) -> None:
        setting = self.setting
        self.model = tiny(self.seed).to(DTYPES[setting.precision])
        self.model.batch_norm.float()
        for name in setting.frozen:
            self.model.get_parameter(name).requires_grad_(False)
        named = dict(self.model.named_parameters())
        self.buffers = [self._copy_buffers() for _ in range(setting.ranks)]
        vector = {name: p.ndim < 2 and setting.split for name, p in named.items()}
        self.group = {name: int(vector[name]) for name in named}
        decays = {name: 0.0 if vector[name] else setting.decay for name in named}
        self.optimizer = PlainOptimizer(setting.optimizer, {n: p.detach().double() for n, p in named.items()}, decays)
        self.base = [setting.lr, setting.lr * VECTOR_FACTOR][: 2 if setting.split else 1]
        self.scheduled = 0
        self.lrs = self._scheduled(0)
        self.steps = self.skipped = 0
        self.scale = Scale(setting.precision == "fp16", 2.0**FP16_POWER if setting.precision == "fp16" else 1.0)
        self.stale: dict[str, Tensor] = {}
        self.broken = False
        self.shown = {name: w.clone() for name, w in self.optimizer.weights.items()}
        if self.wrapped:  # DeepSpeed's 16-bit wrapper of stage 0 takes a step with zeros, which the model does not see
            zeros = {name: torch.zeros(w.shape) for name, w in self.optimizer.weights.items()}
            self.optimizer.step(zeros, self._lr_by_name(), {})

    @property
    def _loss_scale(self) -> float:
        """What losses are multiplied by; DeepSpeed scales none at stage 0."""
        return 1.0 if self.setting.stage == 0 else self.scale.value

    @property
    def _rows(self) -> int:
        return len(self.optimizer.weights[self.embedding])

    @property
    def wrapped(self) -> bool:
        return self.setting.stage == 0 and self.setting.precision != "fp32"

    @property
    def keeps(self) -> bool:
        """Whether DeepSpeed steps a parameter that a batch does not use with its gradient of a former batch."""
        return self.setting.stage == 3 or self.setting.offload

    def _copy_buffers(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def _reseed(self) -> None:
        self.starts += 1
        self.random = []
        for rank in range(self.setting.ranks):
            torch.manual_seed(random_state(self.seed, self.starts, rank))
            self.random.append(torch.get_rng_state())

    def _switch_off(self) -> None:
        """`mols_ds.initialize` without a section: what a loaded checkpoint has of MoLS is kept for those saved here."""
        self.off, self.kept = True, (None, None)

    def _attach(self, section: Section, steps: int) -> None:
        """MoLS is attached after `steps` steps of the engine."""
        self.off = False
        layers = section.get("granularity") == "layer_type"
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.mols = Mols(section, {name: group_of(name, layers) for name in trained})
        self.guarded = GUARDED
        self.named: set[str] = set()
        if self.setting.engine == "deepspeed" and steps > section["start"] and not section.get("fixed_alphas"):
            self.mols.said.append("past mols.start")
        self.mols.advance(self.steps)

    # ------------------------------------------------------------------ actions

    def play(self, action: Action) -> tuple[Action, Seen] | None:
        """Do it. Returns it as it was done and what is to be seen; None: it is not legal now and nothing was done."""
        if self.over:
            return None
        evaluated: list[float] = []
        error = ""
        self.applied = {}
        if isinstance(action, Step):
            action = self._legal(action)
            error = self._step(action)
        elif isinstance(action, Evaluate):
            evaluated = self._evaluate()
        elif isinstance(action, Freeze):
            if action.frozen and self._poisoned:
                return None
            self.model.get_parameter(action.name).requires_grad_(not action.frozen)
        elif isinstance(action, Save):
            self._save(action.tag)
        elif isinstance(action, Load):
            if not self._can_load(action):
                return None
            self._load(action)
        elif isinstance(action, Detach):
            if self.mols is None:
                return None
            self.mols, self.off = None, False
        elif isinstance(action, Attach):
            if self.mols is not None:
                return None
            action = self._legal_attach(action)
            self._attach(action.section, self.steps)
        elif isinstance(action, EditRate):
            self.lrs = [lr * action.factor for lr in self.lrs]
        elif isinstance(action, BreakOptimizer):
            if not self._would_be_caught():
                return None
            self.broken = True
        return action, self._seen(evaluated, error)

    def _legal(self, step: Step) -> Step:
        discards = self.mols is not None and self.mols.discards
        if self.broken or (step.bad is not None and self.setting.stage == 0 and not self.wrapped and not discards):
            step = Step(step.unused, step.on)  # torch's own optimizer would step with NaN
        if step.bad is not None and self.setting.offload and not discards:
            frozen = not all(p.requires_grad for p in self.model.parameters())
            step = Step(step.unused, step.on, None if frozen else step.bad)
        return Step(bad=step.bad) if self._poisoned and not discards else step

    def _legal_attach(self, attach: Attach) -> Attach:
        return attach

    @property
    def _poisoned(self) -> bool:
        """Whether DeepSpeed would step what a batch does not use with NaN, as what CPU offload keeps is not checked."""
        return self.setting.offload and not all(bool(torch.isfinite(g).all()) for g in self.stale.values())

    def _can_load(self, load: Load) -> bool:
        """Whether the checkpoint is there and, where both sides have MoLS, of the same weights (else it is refused)."""
        if load.tag not in self.checkpoints:
            return False
        if self.setting.stage == 3 and self.checkpoints[load.tag]["frozen"] != self._frozen_after(load):
            return False  # DeepSpeed ends in a KeyError there
        saved = self.checkpoints[load.tag]["mols"][1]
        frozen = (
            self.setting.frozen if load.fresh else [n for n in self.group if n not in getattr(self.mols, "groups", ())]
        )
        resumes = load.section is not None if load.fresh else self.mols is not None
        return not resumes or saved is None or set(saved) == set(self.group) - set(frozen)

    def _frozen_after(self, load: Load) -> set[str]:
        """Parameters that are frozen while a checkpoint is loaded."""
        now = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        return set(self.setting.frozen) if load.fresh else now

    def _would_be_caught(self) -> bool:
        mols = self.mols
        return bool(mols and not mols.discards and self.guarded and set(mols.rates(self.steps).values()) != {1.0})

    def _seen(self, evaluated: list[float], error: str) -> Seen:
        mols = self.mols
        said = self.said if mols is None else mols.said
        self.said = []
        seen = Seen(
            self.steps, self.skipped, list(self.lrs), self.scale.value, [digest(state) for state in self.random],
            [dict(b) for b in self.buffers], {n: w.clone() for n, w in self.optimizer.weights.items()},
            said=[list(said)], evaluated=evaluated, error=error,
        )  # fmt: skip
        if mols is not None:
            seen.phase, seen.samples, seen.alphas = mols.phase, mols.counted, dict(mols.alphas)
            seen.rates = dict(self.applied)
            mols.said = []
        return seen

    # ------------------------------------------------------------------ passes

    @torch.no_grad()
    def _to_model(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.shown[name])

    def _put_buffers(self, rank: int) -> None:
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self.buffers[rank][name])

    def _evaluate(self) -> list[float]:
        self._to_model()
        self.model.eval()
        losses = []
        for rank in range(self.setting.ranks):
            self._put_buffers(rank)
            with torch.no_grad():
                losses.append(float(self.model(batch(self.seed, 0, 0, rank))))
        self.model.train()
        return losses

    def _gradient(self, step: Step) -> dict[str, Tensor]:
        """The mean over ranks and micro-batches, times the loss scale; without the parameters that got none."""
        setting, total = self.setting, dict[str, Tensor]()
        scale = self._loss_scale
        self.looked_up = torch.zeros(self._rows, dtype=torch.bool)
        self._to_model()
        for rank in range(setting.ranks):
            torch.set_rng_state(self.random[rank])
            self._put_buffers(rank)
            left_out = step.unused if step.on is None or rank in step.on else ()
            muted = step.on is not None and setting.stage > 0
            for micro in range(setting.micros):
                self.model.zero_grad()
                options = {"muted": left_out} if muted else {"unused": left_out}
                ids = batch(self.seed, self.batches, micro, rank)
                self.looked_up[ids] = True
                loss = self.model(ids, **options)
                loss = loss * float("nan") if step.bad == rank else loss
                (loss / setting.micros * scale).backward()
                for name, p in self.model.named_parameters():
                    if p.grad is not None and p.requires_grad:
                        total[name] = total.get(name, torch.zeros(p.shape)) + p.grad.float() / setting.ranks
            self.random[rank], self.buffers[rank] = torch.get_rng_state(), self._copy_buffers()
        self.batches += 1
        return total

    # ------------------------------------------------------------------ a step

    def _step(self, step: Step) -> str:
        mols = self.mols
        discards = mols is not None and mols.discards
        measured = mols is not None and mols.phase == "calibrating" and mols.section["mode"] != "probe"
        if discards or measured:
            self.stale = {}
        gradients = self._probed_gradient(mols, step) if mols is not None and discards else self._gradient(step)
        finite = all(bool(torch.isfinite(g).all()) for g in gradients.values())
        if mols is not None and discards:
            self._discard(mols, gradients, finite)
            return ""
        if self.broken and self._would_be_caught():
            self.over = True
            return "MolsError"
        self._take(gradients)
        return ""

    def _probed_gradient(self, mols: Mols, step: Step) -> dict[str, Tensor]:
        """Of a batch that is discarded: it draws from the window's own stream, and gives buffers back."""
        outside, buffers = list(self.random), copy.deepcopy(self.buffers)
        self.random = list(mols.window or self.random)
        gradients = self._gradient(step)
        mols.window = list(self.random)
        self.random, self.buffers = outside, buffers
        return gradients

    def _whole(self, gradients: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
        """Every parameter's, 0 where there is none."""
        return {n: gradients.get(n, torch.zeros(w.shape)) / scale for n, w in self.optimizer.weights.items()}

    def _discard(self, mols: Mols, gradients: Mapping[str, Tensor], finite: bool) -> None:
        if finite:
            mols.sample(self.steps, self._whole(gradients, self._loss_scale), self.looked_up)
        elif self.setting.stage == 0 or not self.scale.lower():
            mols.sample(self.steps, None, self.looked_up)
        self.stale = {}
        if not mols.discards:
            mols.window = None
        mols.advance(self.steps)

    def _take(self, found: Mapping[str, Tensor]) -> None:
        mols, setting = self.mols, self.setting
        rates = {} if mols is None else mols.rates(self.steps)
        calibrating, mode = (False, "") if mols is None else (mols.phase == "calibrating", mols.section["mode"])
        gradients = self._stepped(found)
        before = self._loss_scale
        checked = found if setting.offload else gradients
        updated = all(bool(torch.isfinite(g).all()) for g in checked.values())
        self.scale.update(not updated)
        moved = (self.optimizer.moments()[self.embedding][1] != 0).any(1)  # by the steps before this one
        divisor = clip_factor(checked, setting.clip, self._divided_by(before)) if updated else 1.0
        clipped = {name: g / divisor for name, g in gradients.items()}
        if self.keeps:
            self.stale = clipped if setting.offload else {**self.stale, **found}
        if updated:
            self.applied = dict(rates)
            self._name_unfrozen()
            if rates and set(rates.values()) != {1.0}:
                self.guarded -= self.guarded > 0
            by_name = {} if mols is None else {name: rates[group] for name, group in mols.groups.items()}
            self._update(clipped, by_name)
            if setting.scheduled:
                self.scheduled += 1
                self.lrs = self._scheduled(self.scheduled)
        self._count(updated)
        if mols is None:
            return
        if calibrating and mode == "online":
            mols.sample(self.steps, self._whole(gradients, before) if updated else None, self.looked_up)
        elif calibrating and mode == "moments":
            mols.moments(self.steps, self.optimizer.moments() if updated else None, BETAS, moved)
        mols.advance(self.steps)

    def _divided_by(self, before: float) -> float:
        """The scale that gradients are divided by in a step; DeepSpeed lets it grow first."""
        return self.scale.value

    def _name_unfrozen(self) -> None:
        """MoLS warns, once, of weights that train and were frozen when it was attached."""
        if self.mols is None:
            return
        new = {n for n, p in self.model.named_parameters() if p.requires_grad} - set(self.mols.groups) - self.named
        if new:
            self.named |= new
            self.mols.said.append("weights train that were frozen")

    def _scheduled(self, step: int) -> list[float]:
        """The base rates that the scheduler sets for a step."""
        return [base * (schedule(step) if self.setting.scheduled else 1.0) for base in self.base]

    def _count(self, updated: bool) -> None:
        self.skipped += not updated
        self.steps += 1

    def _stepped(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the optimizer is given. DeepSpeed gives zeros for a parameter without a gradient; what it keeps of a
        former batch, where it does; nothing at stage 0 in fp32 where it is frozen."""
        missing = self._whole({})
        if self.setting.offload:
            missing |= self.stale
        elif self.keeps:
            missing |= {n: g for n, g in self.stale.items() if self.model.get_parameter(n).requires_grad}
        if self.setting.stage == 0 and not self.wrapped:
            missing = {n: g for n, g in missing.items() if self.model.get_parameter(n).requires_grad}
        return missing | dict(found)

    def _update(self, gradients: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        unscaled = self.mols is not None and self.mols.section["weight_decay"] == "unscaled"
        self.optimizer.step(gradients, self._lr_by_name(), rates, unscaled)
        self.shown = {name: w.clone() for name, w in self.optimizer.weights.items()}

    def _lr_by_name(self) -> dict[str, float]:
        return {name: self.lrs[group] for name, group in self.group.items()}

    # ------------------------------------------------------------------ checkpoints

    def _save(self, tag: str) -> None:
        buffers = self.buffers if self.setting.stage == 3 else [self.buffers[0]] * self.setting.ranks
        self.checkpoints[tag] = copy.deepcopy(
            {
                "optimizer": self.optimizer.saved(),
                "buffers": buffers,
                "counters": (self.steps, self.skipped, self.scheduled, list(self.lrs), self.scale),
                "mols": self._held(),
                "frozen": {name for name, p in self.model.named_parameters() if not p.requires_grad},
                "shown": self.shown,
            }
        )

    def _held(self) -> tuple[Any, Any]:
        """(state, weights) of MoLS that a checkpoint of this run holds."""
        if self.mols is not None:
            return self.mols.state(), list(self.mols.groups)
        return self.kept if self.off else (None, None)

    def _load(self, load: Load) -> None:
        saved = copy.deepcopy(self.checkpoints[load.tag])
        if load.fresh:
            self._build()
            self.mols = None
            if load.section is not None:
                self._attach(load.section, 0)
            else:
                self._switch_off()
        self.optimizer.load(saved["optimizer"])
        self.shown = saved["shown"]
        self.buffers = saved["buffers"]
        self.steps, self.skipped, self.scheduled, self.lrs, self.scale = saved["counters"]
        self._reseed()
        state, groups = saved["mols"]
        if self.mols is not None:
            self.mols.resume(state, self.steps)
        elif self.off:
            self.kept = (None, None)
            if state is not None:
                self.kept = ({"since": self.steps, **state, "lost": True, "window": None}, groups)
                self.said = ["was saved with MoLS"]
