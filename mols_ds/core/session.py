"""The step protocol: what one call of the optimizer's step does under MoLS, the same for every engine.

    probe    measure the gradient at the boundary and discard the step, K times
    online   take the step and measure its gradient
    moments  take the step and read Adam's moments after the last step of the window

An engine adapter subclasses `Session` and passes the engine's own step to `take_step`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mols_ds.core.adam_moments import SteadyBetas, adam_moments, moment_pieces, moments_of
from mols_ds.core.config import MolsConfig
from mols_ds.core.controller import Controller
from mols_ds.core.forward_hook import ForwardHook
from mols_ds.core.group_stats import NoiseFloor
from mols_ds.core.handle import Handle
from mols_ds.core.lr_scaler import LRScaler
from mols_ds.core.new_weights import NewWeights
from mols_ds.core.pieces import local_part, zero_pieces
from mols_ds.core.probe_window import ProbeWindow
from mols_ds.core.protocols import GradientSource, OpenStep
from mols_ds.core.ranges import ShardRange
from mols_ds.core.resume_rules import changed, other_mode, reenabled_warning, section_of
from mols_ds.core.vocabulary import TokenIds
from mols_ds.errors import MolsError

GUARDED_STEPS = 2
"""Number of scaled steps to watch: one that creates optimizer state, one that finds it."""


class Session(Handle, ABC):
    """MoLS on one optimizer: the handle of users, and the step protocol.

    Every rank makes the same calls in the same order. A rank without elements joins every reduction.

    Attributes:
        config: the "mols" section.
        source: this rank's gradients.
        scalers: one per inner optimizer; they apply the multipliers around its step.
        window: state to restore after a probe window.
        new_weights: warns about weights added after attaching.
    """

    config: MolsConfig
    source: GradientSource
    window: ProbeWindow
    new_weights: NewWeights

    def __init__(self, config: MolsConfig) -> None:
        self.config = config
        self.scalers: list[LRScaler] = []
        self._sampling = self._sampled = self._stepping = False
        self._step_number = 0
        self._betas = SteadyBetas()
        self._steps_to_guard = GUARDED_STEPS
        self._kept_buffers: set[str] = set()
        self._warned_no_forward = False
        self._token_ids = TokenIds(self._see_ids)
        self._hooks: list[Any] = []

    @property
    def controller(self) -> Controller:
        """Groups, phases, accumulators and report."""
        assert self._controller is not None, "the adapter makes the controller when it attaches"
        return self._controller

    def _release(self) -> None:
        """The part of `detach` that all engines share: rates, hooks, state of a probe window, accumulators."""
        for undone in (*self.scalers, *self._hooks):
            undone.remove()
        self.window.restore()
        self.controller.elements.free()

    # ------------------------------------------------------------------ for subclasses

    @property
    @abstractmethod
    def steps(self) -> int:
        """Optimizer steps so far, as `start` and `ramp_end` count them."""

    @abstractmethod
    def base_lrs(self) -> dict[str, float]:
        """Module group -> learning rate that the scheduler set, from this rank's parameter groups."""

    @abstractmethod
    def owned_in(self, tensor: Tensor) -> Sequence[tuple[int, ShardRange]]:
        """(number of the owned range, its place in the tensor) for the owned ranges of an inner tensor."""

    @abstractmethod
    def adam_settings(self, step: int) -> tuple[int, float, float]:
        """(Adam's step, beta1, beta2) for a rank whose shard is empty. `step`: count of this session."""

    def _prepare_probe(self) -> bool:
        """Make the gradient of a discarded step readable. Returns whether it is finite by the engine on this rank."""
        return True

    def _before_step(self) -> None:
        """Run before the engine's own step; mode "online" may take its sample here."""

    def _lower_scale(self) -> bool:
        """Lower a dynamic loss scale after a non-finite gradient, as a skipped step of the engine does. Returns whether
        it was lowered, the same on every rank: then the batch does not count as an attempt."""
        return False

    def _after_discard(self, usable: bool) -> None:
        """Restore the engine's counters after a discarded step. `usable`: the gradient was finite."""

    # ------------------------------------------------------------------ one step

    def take_step(self, stock: Callable[[], bool]) -> bool:
        """Run one optimizer step: measure and discard it, or take it with its multipliers.

        Args:
            stock: takes the engine's own step; returns whether it updated the weights.

        Returns:
            Whether `stock` was called.

        Raises:
            MolsError: on every rank, if the optimizer left out a tensor or stepped it twice (first scaled steps only).
        """
        if self.controller.discards_steps:
            self._probe()
            return False
        opened = self._open_step()
        try:
            self._before_step()
            updated = stock()
        finally:
            self._leave_step()
        self._close_step(opened, updated)
        return True

    def _open_step(self) -> OpenStep:
        """Before an update: fix its rates, and find out what it measures."""
        controller = self.controller
        t = self.steps
        self._sampling, self._sampled = controller.measuring and self.config.mode == "online", False
        if controller.reads_moments_next:
            optimizers = [scaler.optimizer for scaler in self.scalers]
            controller.find_seen(lambda: controller.elements.rows_by_moments(optimizers, self.owned_in))
        self._step_number, self._stepping = t + 1, True
        guarded = self._steps_to_guard > 0 and any(rate != 1.0 for rate in controller.rates(t).values())
        for scaler in self.scalers:
            scaler.watching = guarded
            scaler.keep_order()
        return OpenStep(t, self.base_lrs(), controller.reads_moments_next, guarded)

    def _leave_step(self) -> None:
        """Restore the optimizers' parameter groups, also after a step that raised."""
        self._stepping = False
        for scaler in self.scalers:
            scaler.restore()

    def _close_step(self, opened: OpenStep, updated: bool) -> None:
        """After an update, or one that the engine skipped: record its rates, end its sample, move on."""
        if updated:
            self.controller.applied(opened.t, opened.base_lrs)
            self.new_weights.check(lambda line: self.controller.warn(line, every_rank=True))
        if updated and opened.guarded:
            self._check_stepped()
        self._close_sample(updated, opened.reads_moments)
        self.controller.advance(self.steps)

    def _check_stepped(self) -> None:
        """End a guarded step: raise on all ranks if one saw a wrong step. One reduction of 8 bytes."""
        self._steps_to_guard -= 1
        problem = next((scaler.problem for scaler in self.scalers if scaler.problem), "")
        if not self.agree(not problem):
            raise MolsError(
                problem
                or "the optimizer of another rank left out tensors with a gradient, or counted a scaled "
                "step twice: see that rank's message"
            )

    def _probe(self) -> None:
        """Measure this boundary's gradient and discard it. One 8-byte reduction replaces the norm's."""
        controller, t = self.controller, self.steps
        usable = self._measure()
        self.source.discard()
        self._after_discard(usable)
        self._restore_batch()
        if not usable and self._lower_scale():
            controller.elements.drop_ids()
            controller.log("MoLS: a gradient overflowed; the loss scale is lowered and the batch is not counted")
        else:
            controller.close_sample(t, usable=usable)
        if not controller.discards_steps:
            self._close_window()
        controller.advance(t)

    def _measure(self) -> bool:
        """Take this boundary's gradient as a sample if it is finite on every rank. Returns whether it is."""
        self._sampled = False
        found_finite = self._prepare_probe()
        usable = self.agree(found_finite and self.source.finite())
        if usable:
            self.take_sample(1.0 / self.source.loss_scale())
        return usable

    def _restore_batch(self) -> None:
        """Restore module state after a discarded batch. Warns about state that cannot be restored."""
        if not self.window.passed and not self._warned_no_forward:
            self._warned_no_forward = True
            self.controller.warn(
                "no forward pass of the model ran in a batch of the probe window (only of parts of it?): "
                'random numbers and buffers cannot be restored; call the model, or set "mode": "online"',
                every_rank=True,
            )
        new = sorted({*self.window.close_batch()} - self._kept_buffers)
        self.window.passed = False
        if new:
            self._kept_buffers |= {*new}
            self.controller.warn(
                "modules registered buffers in a batch of the probe window, which cannot be removed: "
                f'{", ".join(new[:3])}; set a later "mols.start", or "mode": "online"',
                every_rank=True,
            )

    def _close_window(self) -> None:
        """End a probe window and restore the rest. Warns about parameters that it changed."""
        moved = self.window.restore()
        if moved:
            self.controller.warn(
                f"forward passes of the probe window changed {len(moved)} parameters ({', '.join(moved[:3])}), which "
                'stay changed; update them in the training loop, or set "mode": "online"',
                every_rank=True,
            )

    def _close_sample(self, updated: bool, reads_moments: bool) -> None:
        controller = self.controller
        if self._sampling:
            self._sampling = False
            controller.close_sample(self.steps, usable=self._sampled)
        elif controller.measuring and self.config.mode == "moments":
            controller.count(self.steps, usable=updated)
            if reads_moments and updated:
                self._open_moments()
                controller.close_moments(self.steps, self._betas.steady(self._step_number))

    # ------------------------------------------------------------------ samples

    @property
    def wants_sample(self) -> bool:
        """Mode "online": whether the current step is a sample that is not taken yet."""
        return self._sampling and not self._sampled

    def open_sample(self) -> None:
        """Open the sample of this step, once."""
        if not self._sampled:
            self.controller.elements.open()
            self._sampled = True

    def take_sample(self, factor: float = 1.0) -> None:
        """Add the gradients of all owned elements, times `factor`, as this step's sample."""
        self.open_sample()
        with closing(self.source.read()) as parts:
            for offset, gradient in parts:
                self.controller.elements.add(offset, gradient, factor)

    def _watch_passes(self, module: nn.Module) -> list[RemovableHandle | TokenIds]:
        """Hook the forward passes of the model, or of a part that is called on its own."""
        return [
            self._token_ids,
            module.register_forward_pre_hook(ForwardHook(self.before_forward)),
            module.register_forward_hook(ForwardHook(self.after_forward), always_call=True),
        ]

    def before_forward(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model: open a pass of the probe window. Ignores passes without gradients."""
        reads_ids = self.controller.measuring and self.config.mode != "moments"
        tokens = self.controller.elements.vocabulary if reads_ids else None
        self._token_ids.follow(module, None if tokens is None else tokens.rows)
        if self.controller.discards_steps and torch.is_grad_enabled():
            self.window.open_pass()

    def _see_ids(self, ids: Tensor) -> None:
        """Record the ids of an embedding's look-up in a measured pass."""
        if self.controller.measuring and torch.is_grad_enabled():
            self.controller.elements.see_ids(ids)

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model; runs even if the pass raised."""
        self.window.close_pass()

    # ------------------------------------------------------------------ mode "moments"

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _read_moments(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Step post-hook of an inner optimizer: add Adam's moments while their state is in memory (NVMe).

        Runs only in a step that ends the window, not in dummy steps that allocate state before a load (Megatron).
        """
        if not self._stepping or self.config.measures != "moments":
            return
        self._betas.see(optimizer.param_groups, self._step_number)
        if not self.controller.reads_moments_next or not self._betas.steady(self._step_number):
            return
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                for number, item in self.owned_in(tensor):
                    self._add_moments(moments_of(optimizer, tensor), group, number, item)
        self._open_moments()

    def _add_moments(self, state: Mapping[str, Any], group: Mapping[str, Any], number: int, item: ShardRange) -> None:
        if not state:  # this parameter never had a gradient: it never moved
            self._open_moments()
            for at, nothing in zero_pieces(item.numel):
                self.controller.elements.add_squares(number, nothing, nothing, at)
            return
        step = int(state.get("step", group.get("step", self._step_number)))
        mean, square = (item.view(local_part(state[key]).detach().reshape(-1)) for key in ("exp_avg", "exp_avg_sq"))
        for at, mu2, s2, noise_weight in moment_pieces(mean, square, step, *group["betas"]):
            self._open_moments(noise_weight)
            self.controller.elements.add_squares(number, mu2, s2, at)

    def _open_moments(self, noise_weight: float | None = None) -> None:
        """Open the sums of Adam's moments, once. Every rank does, also with an empty shard."""
        if self.controller.elements.has_squares:
            return
        if noise_weight is None:
            zero = torch.zeros(1, device="cpu")
            noise_weight = adam_moments(zero, zero, *self.adam_settings(self._step_number))[2]
        self.controller.elements.open_squares(NoiseFloor(1.0, noise_weight))

    # ------------------------------------------------------------------ collectives

    def reduce(self, values: Tensor) -> Tensor:
        """SUM over the ranks with disjoint owned elements. 1-D float64 in, CPU float64 out."""
        return self.source.reduce(values)

    def agree(self, ok: bool) -> bool:
        """Whether `ok` is True on every rank: one all-reduce of 8 bytes."""
        return int(self.reduce(torch.tensor([0.0 if ok else 1.0], dtype=torch.float64, device="cpu")).item()) == 0

    # ------------------------------------------------------------------ after loading a checkpoint

    def common_state(self) -> dict[str, Any]:
        """Return the MoLS state of a checkpoint that is the same on every rank."""
        return {**self.controller.state_dict(), "mode": self.config.mode, "section": section_of(self.config)}

    def resume(self, saved: Mapping[str, Any], t: int, load_samples: Callable[[], str | None]) -> None:
        """Continue at step t from the state of a checkpoint. Collective.

        Args:
            saved: result of `common_state`.
            t: optimizer steps so far.
            load_samples: loads this engine's accumulators of a partial calibration. Returns an error, the same on
                every rank, or None.

        Raises:
            MolsCheckpointError: not a MoLS state, or other module groups. Nothing is changed then.
        """
        controller = self.controller
        controller.load_state_dict(saved)
        if (warning := reenabled_warning(saved, t)) is not None:
            controller.warn(warning, every_rank=True)
        kept, applied = changed(saved.get("section"), self.config, controller.phase)
        for line in kept:
            controller.warn(line, every_rank=True)
        for line in applied:
            controller.log(f"MoLS: {line}")
        controller.follow_config(t)
        if controller.measuring:
            problem = other_mode(saved, controller.samples, self.config.mode) or load_samples()
            if problem is not None:
                self.window.forget()
                controller.restart(
                    t, f"the partial calibration of this checkpoint cannot be continued: {problem}; it starts over"
                )
        controller.advance(t)
        controller.log(
            f"MoLS resumed at step {t}: phase {controller.phase}, {controller.samples} samples, "
            f"alphas {controller.alphas or 'not set yet'}"
        )

    def resume_without_state(self, t: int) -> None:
        """Continue at step t from a checkpoint that was saved without MoLS."""
        controller: Controller = self.controller
        start = max(t, controller.state.schedule.start)
        what = "mols.fixed_alphas apply" if controller.config.fixed_alphas is not None else "the calibration starts"
        controller.restart(
            t,
            f"the checkpoint at step {t} has no MoLS state (it was saved without MoLS): all multipliers are 1, "
            f"{what} at step {start}",
            forget=True,
        )
