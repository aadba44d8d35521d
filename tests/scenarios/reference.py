"""The reference: one process, plain torch, no engine. It gives the expected snapshot after each action."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.helpers.digests import digest
from tests.scenarios.model import batch, group_of, random_state, tiny
from tests.scenarios.reference_mols import ReferenceMols
from tests.scenarios.reference_optimizer import BETAS, FP16_POWER, ReferenceOptimizer, Scale, clip_factor
from tests.scenarios.scenario import (
    Action,
    Attach,
    BreakOptimizer,
    Detach,
    EditRate,
    Evaluate,
    Freeze,
    Load,
    Save,
    Scenario,
    Section,
    Step,
)
from tests.scenarios.snapshot import Snapshot

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VECTOR_FACTOR = 2.0  # with two parameter groups: lr of the vectors over lr of the matrices
GUARDED_STEPS = 2  # scaled steps that MoLS checks for tensors that the optimizer did not step


def schedule(step: int) -> float:
    """The factor by which the scheduler multiplies each base rate."""
    return min((step + 1) / 3, 1.0) * 0.97**step


class ReferenceRun:
    """The whole state of a run. `apply` performs an action.

    An action that the engine would refuse at this point is changed into a valid one, or skipped.
    """

    embedding = "embed_tokens.weight"

    def __init__(self, scenario: Scenario) -> None:
        self.seed, self.settings = scenario.seed, scenario.settings
        self.checkpoints: dict[str, Any] = {}
        self.batches = self.seedings = 0
        self.mols: ReferenceMols | None = None
        self.finished = False
        self.applied_rates: dict[str, float] = {}
        self.warnings: list[str] = []
        self.mols_disabled, self.kept_mols_state = False, (None, None)
        self._build()
        self._reseed()
        if self.settings.section is not None:
            self._attach(self.settings.section, 0)
        else:
            self._disable_mols()

    # ------------------------------------------------------------------ build

    def _build(self) -> None:
        settings = self.settings
        self.model = tiny(self.seed).to(DTYPES[settings.precision])
        self.model.batch_norm.float()
        for name in settings.frozen:
            self.model.get_parameter(name).requires_grad_(False)
        named = dict(self.model.named_parameters())
        self.buffers = [self._copy_buffers() for _ in range(settings.ranks)]
        vector = {name: p.ndim < 2 and settings.split for name, p in named.items()}
        self.group = {name: int(vector[name]) for name in named}
        decays = {name: 0.0 if vector[name] else settings.decay for name in named}
        self.optimizer = ReferenceOptimizer(
            settings.optimizer, {n: p.detach().double() for n, p in named.items()}, decays
        )
        self.base = [settings.lr, settings.lr * VECTOR_FACTOR][: 2 if settings.split else 1]
        self.scheduled = 0
        self.lrs = self._scheduled(0)
        self.steps = self.skipped = 0
        self.scale = Scale(settings.precision == "fp16", 2.0**FP16_POWER if settings.precision == "fp16" else 1.0)
        self.stale_gradients: dict[str, Tensor] = {}
        self.broken = False
        self.model_weights = {name: w.clone() for name, w in self.optimizer.weights.items()}
        if self.has_16bit_wrapper:  # its first step has gradients of 0; the model does not get the new weights
            zeros = {name: torch.zeros(w.shape) for name, w in self.optimizer.weights.items()}
            self.optimizer.step(zeros, self._lr_by_name(), {})

    @property
    def _loss_scale(self) -> float:
        """The factor of each loss. At stage 0 DeepSpeed does not scale losses."""
        return 1.0 if self.settings.stage == 0 else self.scale.value

    @property
    def _rows(self) -> int:
        return len(self.optimizer.weights[self.embedding])

    @property
    def has_16bit_wrapper(self) -> bool:
        """Whether DeepSpeed uses its 16-bit optimizer of stage 0."""
        return self.settings.stage == 0 and self.settings.precision != "fp32"

    @property
    def keeps_stale_gradients(self) -> bool:
        """Whether DeepSpeed steps a parameter without a gradient with its gradient of an earlier batch."""
        return self.settings.stage == 3 or self.settings.offload

    def _copy_buffers(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def _reseed(self) -> None:
        self.seedings += 1
        self.random = []
        for rank in range(self.settings.ranks):
            torch.manual_seed(random_state(self.seed, self.seedings, rank))
            self.random.append(torch.get_rng_state())

    def _disable_mols(self) -> None:
        """`mols_ds.initialize` without a section: later checkpoints contain the MoLS state of the loaded one."""
        self.mols_disabled, self.kept_mols_state = True, (None, None)

    def _attach(self, section: Section, steps: int) -> None:
        """Attach MoLS after `steps` steps of the engine."""
        self.mols_disabled = False
        layers = section.get("granularity") == "layer_type"
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.mols = ReferenceMols(section, {name: group_of(name, layers) for name in trained})
        self.guarded_steps = GUARDED_STEPS
        self.reported_weights: set[str] = set()
        if self.settings.engine == "deepspeed" and steps > section["start"] and not section.get("fixed_alphas"):
            self.mols.warnings.append("past mols.start")
        self.mols.advance(self.steps)

    # ------------------------------------------------------------------ actions

    def apply(self, action: Action) -> tuple[Action, Snapshot] | None:
        """Perform an action.

        Returns:
            The action as it was performed, and the expected snapshot. None: the action is not valid now.
        """
        if self.finished:
            return None
        eval_losses: list[float] = []
        error = ""
        self.applied_rates = {}
        if isinstance(action, Step):
            action = self._valid_step(action)
            error = self._step(action)
        elif isinstance(action, Evaluate):
            eval_losses = self._evaluate()
        elif isinstance(action, Freeze):
            if action.frozen and self._stale_not_finite:
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
            self.mols, self.mols_disabled = None, False
        elif isinstance(action, Attach):
            if self.mols is not None:
                return None
            action = self._valid_attach(action)
            self._attach(action.section, self.steps)
        elif isinstance(action, EditRate):
            self.lrs = [lr * action.factor for lr in self.lrs]
        elif isinstance(action, BreakOptimizer):
            if not self._guard_raises():
                return None
            self.broken = True
        return action, self.snapshot(eval_losses, error)

    def _valid_step(self, step: Step) -> Step:
        discards = self.mols is not None and self.mols.discards
        if self.broken or (
            step.bad is not None and self.settings.stage == 0 and not self.has_16bit_wrapper and not discards
        ):
            step = Step(step.unused, step.on)  # torch's optimizer would step with NaN
        if step.bad is not None and self.settings.offload and not discards:
            frozen = not all(p.requires_grad for p in self.model.parameters())
            step = Step(step.unused, step.on, None if frozen else step.bad)
        return Step(bad=step.bad) if self._stale_not_finite and not discards else step

    def _valid_attach(self, attach: Attach) -> Attach:
        return attach

    @property
    def _stale_not_finite(self) -> bool:
        """Whether a stale gradient is NaN. With CPU offload DeepSpeed does not check these, and steps with them."""
        return self.settings.offload and not all(bool(torch.isfinite(g).all()) for g in self.stale_gradients.values())

    def _can_load(self, load: Load) -> bool:
        """Whether the checkpoint exists and, if both runs have MoLS, scales the same weights (else MoLS refuses it)."""
        if load.tag not in self.checkpoints:
            return False
        if self.settings.stage == 3 and self.checkpoints[load.tag]["frozen"] != self._frozen_after(load):
            return False  # DeepSpeed raises KeyError
        saved = self.checkpoints[load.tag]["mols"][1]
        frozen = (
            self.settings.frozen if load.fresh else [n for n in self.group if n not in getattr(self.mols, "groups", ())]
        )
        resumes = load.section is not None if load.fresh else self.mols is not None
        return not resumes or saved is None or set(saved) == set(self.group) - set(frozen)

    def _frozen_after(self, load: Load) -> set[str]:
        """Parameters that are frozen while a checkpoint is loaded."""
        now = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        return set(self.settings.frozen) if load.fresh else now

    def _guard_raises(self) -> bool:
        """Whether the step guard would raise for an optimizer that leaves tensors out."""
        mols = self.mols
        return bool(mols and not mols.discards and self.guarded_steps and set(mols.rates(self.steps).values()) != {1.0})

    def snapshot(self, eval_losses: list[float], error: str) -> Snapshot:
        """The expected snapshot. Removes the warnings that it returns."""
        mols = self.mols
        messages = self.warnings if mols is None else mols.warnings
        self.warnings = []
        snapshot = Snapshot(
            self.steps, self.skipped, list(self.lrs), self.scale.value, [digest(state) for state in self.random],
            [dict(b) for b in self.buffers], {n: w.clone() for n, w in self.optimizer.weights.items()},
            warnings=[list(messages)], eval_losses=eval_losses, error=error,
        )  # fmt: skip
        if mols is not None:
            snapshot.phase, snapshot.samples, snapshot.alphas = mols.phase, mols.usable_samples, dict(mols.alphas)
            snapshot.rates = dict(self.applied_rates)
            mols.warnings = []
        return snapshot

    # ------------------------------------------------------------------ passes

    @torch.no_grad()
    def _load_weights(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.model_weights[name])

    def _load_buffers(self, rank: int) -> None:
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self.buffers[rank][name])

    def _evaluate(self) -> list[float]:
        self._load_weights()
        self.model.eval()
        losses = []
        for rank in range(self.settings.ranks):
            self._load_buffers(rank)
            with torch.no_grad():
                losses.append(float(self.model(batch(self.seed, 0, 0, rank))))
        self.model.train()
        return losses

    def _gradient(self, step: Step) -> dict[str, Tensor]:
        """Mean gradient over ranks and micro-batches, times the loss scale. Has no entry if a parameter got none."""
        settings, total = self.settings, dict[str, Tensor]()
        scale = self._loss_scale
        self.batch_tokens = torch.zeros(self._rows, dtype=torch.bool)
        self._load_weights()
        for rank in range(settings.ranks):
            torch.set_rng_state(self.random[rank])
            self._load_buffers(rank)
            unused = step.unused if step.on is None or rank in step.on else ()
            muted = step.on is not None and settings.stage > 0
            for micro in range(settings.micros):
                self.model.zero_grad()
                options = {"muted": unused} if muted else {"unused": unused}
                ids = batch(self.seed, self.batches, micro, rank)
                self.batch_tokens[ids] = True
                loss = self.model(ids, **options)
                loss = loss * float("nan") if step.bad == rank else loss
                (loss / settings.micros * scale).backward()
                for name, p in self.model.named_parameters():
                    if p.grad is not None and p.requires_grad:
                        total[name] = total.get(name, torch.zeros(p.shape)) + p.grad.float() / settings.ranks
            self.random[rank], self.buffers[rank] = torch.get_rng_state(), self._copy_buffers()
        self.batches += 1
        return total

    # ------------------------------------------------------------------ step

    def _step(self, step: Step) -> str:
        mols = self.mols
        discards = mols is not None and mols.discards
        measured = mols is not None and mols.phase == "calibrating" and mols.section["mode"] != "probe"
        if discards or measured:
            self.stale_gradients = {}
        gradients = self._probe_gradient(mols, step) if mols is not None and discards else self._gradient(step)
        finite = all(bool(torch.isfinite(g).all()) for g in gradients.values())
        if mols is not None and discards:
            self._probe_step(mols, gradients, finite)
            return ""
        if self.broken and self._guard_raises():
            self.finished = True
            return "MolsError"
        self._optimizer_step(gradients)
        return ""

    def _probe_gradient(self, mols: ReferenceMols, step: Step) -> dict[str, Tensor]:
        """Gradient of a discarded batch. It uses the random state of the probe window, and restores the buffers."""
        outside, buffers = list(self.random), copy.deepcopy(self.buffers)
        self.random = list(mols.window_rng or self.random)
        gradients = self._gradient(step)
        mols.window_rng = list(self.random)
        self.random, self.buffers = outside, buffers
        return gradients

    def _with_zeros(self, gradients: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
        """Gradients of all parameters, divided by `scale`; 0 if a parameter has none."""
        return {n: gradients.get(n, torch.zeros(w.shape)) / scale for n, w in self.optimizer.weights.items()}

    def _probe_step(self, mols: ReferenceMols, gradients: Mapping[str, Tensor], finite: bool) -> None:
        if finite:
            mols.sample(self.steps, self._with_zeros(gradients, self._loss_scale), self.batch_tokens)
        elif self.settings.stage == 0 or not self.scale.lower():
            mols.sample(self.steps, None, self.batch_tokens)
        self.stale_gradients = {}
        if not mols.discards:
            mols.window_rng = None
        mols.advance(self.steps)

    def _optimizer_step(self, new_gradients: Mapping[str, Tensor]) -> None:
        mols, settings = self.mols, self.settings
        rates = {} if mols is None else mols.rates(self.steps)
        calibrating, mode = (False, "") if mols is None else (mols.phase == "calibrating", mols.section["mode"])
        gradients = self._optimizer_gradients(new_gradients)
        before = self._loss_scale
        checked = new_gradients if settings.offload else gradients
        updated = all(bool(torch.isfinite(g).all()) for g in checked.values())
        self.scale.update(not updated)
        in_moments = (self.optimizer.moments()[self.embedding][1] != 0).any(1)  # tokens of earlier steps
        divisor = clip_factor(checked, settings.clip, self._unscaling(before)) if updated else 1.0
        clipped = {name: g / divisor for name, g in gradients.items()}
        if self.keeps_stale_gradients:
            self.stale_gradients = clipped if settings.offload else {**self.stale_gradients, **new_gradients}
        if updated:
            self.applied_rates = dict(rates)
            self._warn_unfrozen()
            if rates and set(rates.values()) != {1.0}:
                self.guarded_steps -= self.guarded_steps > 0
            by_name = {} if mols is None else {name: rates[group] for name, group in mols.groups.items()}
            self._update(clipped, by_name)
            if settings.scheduled:
                self.scheduled += 1
                self.lrs = self._scheduled(self.scheduled)
        self._count_step(updated)
        if mols is None:
            return
        if calibrating and mode == "online":
            mols.sample(self.steps, self._with_zeros(gradients, before) if updated else None, self.batch_tokens)
        elif calibrating and mode == "moments":
            mols.moments(self.steps, self.optimizer.moments() if updated else None, BETAS, in_moments)
        mols.advance(self.steps)

    def _unscaling(self, before: float) -> float:
        """The loss scale that a step divides gradients by. DeepSpeed updates the scale before that."""
        return self.scale.value

    def _warn_unfrozen(self) -> None:
        """MoLS warns once about each weight that trains now and was frozen at attach."""
        if self.mols is None:
            return
        new = (
            {n for n, p in self.model.named_parameters() if p.requires_grad}
            - set(self.mols.groups)
            - self.reported_weights
        )
        if new:
            self.reported_weights |= new
            self.mols.warnings.append("weights train that were frozen")

    def _scheduled(self, step: int) -> list[float]:
        """The base rates that the scheduler sets for a step."""
        return [base * (schedule(step) if self.settings.scheduled else 1.0) for base in self.base]

    def _count_step(self, updated: bool) -> None:
        self.skipped += not updated
        self.steps += 1

    def _optimizer_gradients(self, new_gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients that DeepSpeed's optimizer gets.

        A parameter without a gradient gets zeros, or its stale gradient if DeepSpeed keeps one. At stage 0 in fp32 a
        frozen parameter gets none.
        """
        missing = self._with_zeros({})
        if self.settings.offload:
            missing |= self.stale_gradients
        elif self.keeps_stale_gradients:
            missing |= {n: g for n, g in self.stale_gradients.items() if self.model.get_parameter(n).requires_grad}
        if self.settings.stage == 0 and not self.has_16bit_wrapper:
            missing = {n: g for n, g in missing.items() if self.model.get_parameter(n).requires_grad}
        return missing | dict(new_gradients)

    def _update(self, gradients: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        unscaled = self.mols is not None and self.mols.section["weight_decay"] == "unscaled"
        self.optimizer.step(gradients, self._lr_by_name(), rates, unscaled)
        self.model_weights = {name: w.clone() for name, w in self.optimizer.weights.items()}

    def _lr_by_name(self) -> dict[str, float]:
        return {name: self.lrs[group] for name, group in self.group.items()}

    # ------------------------------------------------------------------ checkpoints

    def _save(self, tag: str) -> None:
        buffers = self.buffers if self.settings.stage == 3 else [self.buffers[0]] * self.settings.ranks
        self.checkpoints[tag] = copy.deepcopy(
            {
                "optimizer": self.optimizer.saved(),
                "buffers": buffers,
                "counters": (self.steps, self.skipped, self.scheduled, list(self.lrs), self.scale),
                "mols": self._mols_state(),
                "frozen": {name for name, p in self.model.named_parameters() if not p.requires_grad},
                "model_weights": self.model_weights,
            }
        )

    def _mols_state(self) -> tuple[Any, Any]:
        """State of MoLS and names of its weights, for a checkpoint of this run."""
        if self.mols is not None:
            return self.mols.state(), list(self.mols.groups)
        return self.kept_mols_state if self.mols_disabled else (None, None)

    def _load(self, load: Load) -> None:
        saved = copy.deepcopy(self.checkpoints[load.tag])
        if load.fresh:
            self._build()
            self.mols = None
            if load.section is not None:
                self._attach(load.section, 0)
            else:
                self._disable_mols()
        self.optimizer.load(saved["optimizer"])
        self.model_weights = saved["model_weights"]
        self.buffers = saved["buffers"]
        self.steps, self.skipped, self.scheduled, self.lrs, self.scale = saved["counters"]
        self._reseed()
        state, groups = saved["mols"]
        if self.mols is not None:
            self.mols.resume(state, self.steps)
        elif self.mols_disabled:
            self.kept_mols_state = (None, None)
            if state is not None:
                self.kept_mols_state = ({"since": self.steps, **state, "lost": True, "window_rng": None}, groups)
                self.warnings = ["was saved with MoLS"]
