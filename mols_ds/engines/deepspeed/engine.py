"""MoLS on one DeepSpeed engine: `engine.mols`.

Attaching adds torch step hooks to the inner optimizer (rates, online samples) and replaces `_take_model_step`,
`save_checkpoint` and `load_checkpoint` on the instance. `detach()` undoes all of it. Classes and modules stay
unchanged, except that `load_checkpoint` of other engines is watched (loads.py). There is no proxy of DeepSpeed's
optimizer: with one, training was silently wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from mols_ds.core.config import MolsConfig
from mols_ds.core.controller import Controller
from mols_ds.core.groups import GroupTable
from mols_ds.core.layout import largest_holder
from mols_ds.core.log import say, versions
from mols_ds.core.lr_scaler import make_plan
from mols_ds.core.new_weights import NewWeights
from mols_ds.core.phases import resolve_schedule
from mols_ds.core.protocols import (
    Context,
    window_of_extra_batches,
    window_of_others_schedule,
    window_of_own_loop,
)
from mols_ds.core.ranges import ShardRange
from mols_ds.core.rank_checks import check_counts, check_section
from mols_ds.core.replaced_methods import ReplacedMethods
from mols_ds.core.session import Session
from mols_ds.engines.deepspeed.checkpoint import EngineCheckpoints
from mols_ds.engines.deepspeed.checks import batch_observers, check_supported
from mols_ds.engines.deepspeed.loads import check_order
from mols_ds.engines.deepspeed.parallel.find import find_grid
from mols_ds.engines.deepspeed.probe_window import EngineWindow
from mols_ds.engines.deepspeed.shards import Replicated, find_shards
from mols_ds.errors import MolsConfigError
from mols_ds.optim.rate_curve import rate_curve
from mols_ds.optim.scaling import lr_scaler
from mols_ds.optim.scheduler_hints import scheduler_hints
from mols_ds.optim.traits import is_elementwise
from mols_ds.report.files import Publisher

Loop = Literal["own", "client", "extra"]
"""Caller of `engine.step()`: "own": the user's loop. "client": a loop that asks the optimizer whether the step was
skipped (`overflow`, read by Accelerate). "extra": an integration that feeds extra batches for the samples of mode
"probe"."""


class EngineMols(Session):
    """MoLS on one engine; `engine.mols`. Created by `attach`.

    In mode "probe", during the calibration, `engine.step()` at an accumulation boundary measures the gradient of the
    last batch and does not update. It uses the next K global batches of the user's loop (K = samples). Weights,
    buffers, optimizer state, scheduler, `global_steps`, `micro_steps` and the random numbers of dropout end as if those
    batches had never run (docs/method.md, "What a probe restores").
    """

    window: EngineWindow

    def __init__(self, engine: Any, config: MolsConfig, loop: Loop = "own") -> None:
        super().__init__(config)
        check_supported(engine, config)
        self.engine = engine
        self.loop = loop
        self.grid = find_grid(engine)
        self.window = EngineWindow(engine, self.grid)
        self.source = self.shards = find_shards(engine, self.grid)
        self._check_options()
        curve = partial(rate_curve, engine.lr_scheduler)
        schedule = resolve_schedule(config, *scheduler_hints(engine.lr_scheduler), curve)
        late = check_order(engine, schedule, config.fixed_alphas is None)
        table = self.grid.table(config, self.shards.param_group)
        self._controller = Controller(config, table, self.shards.accumulated, schedule, self._context())
        check_section(config, schedule, self.reduce)
        check_counts(table, self.controller.elements, self.reduce)
        self._lr_group = self._groups_of_lr(table)
        self._scale_before = 1.0
        self._install(table)
        self.checkpoints = EngineCheckpoints(self, engine, self.grid, self.window)
        seen = batch_observers(engine) if config.mode == "probe" and config.fixed_alphas is None else []
        if seen:
            self.controller.warn(f'the batches that "mode": "probe" discards are seen: {"; ".join(seen)}')
        if late is not None:
            self.controller.warn(late)
        self.controller.advance(engine.global_steps)

    def detach(self) -> None:
        """Remove MoLS from the engine, which steps as a stock one from now on. A second call does nothing."""
        if getattr(self.engine, "mols", None) is not self:
            return
        self._release()
        self._methods.undo()
        self.checkpoints.remove()
        self._publisher.release()
        del self.engine.mols

    # ------------------------------------------------------------------ build

    def _install(self, table: GroupTable) -> None:
        """Register hooks in this order: sample, rates, Adam's moments (after the rates are restored)."""
        engine, shards = self.engine, self.shards
        elementwise = is_elementwise(shards.inner)
        plans = {
            id(tensor): make_plan(size, ranges, table.layouts, elementwise=elementwise)
            for tensor, size, ranges in zip(shards.tensors, shards.sizes, shards.ranges, strict=True)
        }
        sample = shards.inner.register_step_pre_hook(self._on_inner_step)
        self.scaler = lr_scaler(
            shards.inner, plans, lambda: self.controller.rates(engine.global_steps), self.config.weight_decay
        )
        self.scalers.append(self.scaler)
        reattach = "call engine.mols.detach() and mols_ds.attach(engine, ...) again"
        early = "unfreeze them, and give them to the optimizer, before the engine is initialized"
        own = shards.outer is shards.inner
        self.new_weights = NewWeights(
            [engine.module],
            self.scalers,
            include=reattach if own else early,
            train=early,
            held=shards.frozen_in_shards,
            again=reattach,
        )
        self._hooks = [
            sample,
            shards.inner.register_step_post_hook(self._read_moments),
            *self._watch_passes(engine.module),
        ]
        self._ranges: dict[int, list[tuple[int, ShardRange]]] = {}
        for number, (index, item) in enumerate(shards.owned):
            self._ranges.setdefault(id(shards.tensors[index]), []).append((number, item))
        self._methods = ReplacedMethods(engine)
        self._take_model_step = self._methods.set("_take_model_step", self._step)

    def _check_options(self) -> None:
        for group in self.shards.inner.param_groups:
            if group.get("lr") is None:
                raise MolsConfigError("the optimizer's lr is None (it sets its own rate): give it an lr to scale")

    def _context(self) -> Context:
        accelerator = get_accelerator()
        self._publisher = Publisher(self.config.report_dir, say)
        on_cpu = self.config.accumulators.device == "cpu"
        return Context(
            reduce=self.reduce,
            device=torch.device("cpu") if on_cpu else torch.device(accelerator.current_device_name()),
            rank=self.engine.global_rank,
            world=self.grid.world,
            versions=versions(self.grid.packages),
            log=say,
            publish=self._publisher,
            announce=self._announce,
            reduce_max=self.shards.reduce_max,
            columns=self.grid.columns,
        )

    def _announce(self, samples: int) -> str:
        """Describe a probe window for this loop. The schedule waits only if the engine steps it, or if the loop asks
        whether the step was skipped."""
        if self.loop == "extra":
            return window_of_extra_batches(samples)
        if self.engine.lr_scheduler is not None:
            return window_of_own_loop(samples)
        schedule = ""
        if self.loop == "client" and hasattr(self.engine.optimizer, "overflow"):
            schedule = (
                "a schedule that waits for optimizer_step_was_skipped (Trainer, Accelerate) does not advance, another "
                f"one advances by {samples} steps meanwhile"
            )
        return window_of_others_schedule(samples, schedule)

    def _groups_of_lr(self, table: GroupTable) -> dict[str, int]:
        """Module group -> index of the parameter group with most of its elements."""
        counts = (
            (self.grid.lr_groups[name], layout.counts(0, math.prod(table.shapes[name])))
            for name, layout in table.layouts.items()
            if name in self.grid.lr_groups
        )
        return largest_holder(counts, table.elements)

    # ------------------------------------------------------------------ hooks of the protocol

    @property
    def steps(self) -> int:
        """DeepSpeed's `global_steps`."""
        return int(self.engine.global_steps)

    def base_lrs(self) -> dict[str, float]:
        groups = self.shards.inner.param_groups
        return {group: float(groups[index]["lr"]) for group, index in self._lr_group.items()}

    def owned_in(self, tensor: Tensor) -> Sequence[tuple[int, ShardRange]]:
        return self._ranges.get(id(tensor), ())

    def adam_settings(self, step: int) -> tuple[int, float, float]:
        """Read the settings from any state, else from the step count."""
        inner = self.shards.inner
        counts = [int(state["step"]) for state in inner.state.values() if "step" in state]
        return max(counts, default=max(2, step)), *inner.param_groups[0]["betas"]

    # ------------------------------------------------------------------ steps

    def _step(self, lr_kwargs: Any = None) -> None:
        """Replace `engine._take_model_step`: measure, or step with this step's multipliers."""

        def stock() -> bool:
            self._set_skipped(False)
            self._take_model_step(lr_kwargs)
            return bool(self.engine.was_step_applied())

        self.take_step(stock)

    def before_forward(self, module: nn.Module, args: Any) -> None:
        if self.controller.measuring and torch.is_grad_enabled():
            self.shards.begin()
        super().before_forward(module, args)

    def _lower_scale(self) -> bool:
        return self.shards.lower_scale()

    def _after_discard(self, usable: bool) -> None:
        before, self.window.micro_steps = self.window.micro_steps, None
        if before is not None:  # `engine.step` then adds one, for any number of micro-batches
            self.engine.micro_steps = before - 1 if self.grid.counts_micro_steps else before
        self._set_skipped(True)
        self.engine.losses = None

    def _set_skipped(self, skipped: bool) -> None:
        """Set the flag that Accelerate reads as `optimizer_step_was_skipped`. DeepSpeed's optimizers set it too."""
        if self.loop == "client" and hasattr(self.engine.optimizer, "overflow"):
            self.engine.optimizer.overflow = skipped

    def _before_step(self) -> None:
        """Take online samples at stage 0, which clips gradients before the inner step and drops the norm."""
        self._scale_before = self.shards.loss_scale()
        if self.wants_sample and isinstance(self.shards, Replicated) and self._all_finite(self.shards):
            self.take_sample()

    def _all_finite(self, shards: Replicated) -> bool:
        """Whether every gradient is finite, the same on every rank; one rank of data-parallel replicas knows it."""
        return self.agree(shards.finite()) if self.grid.model_parallel else shards.finite()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _on_inner_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Take online samples at stages 1-3 from the fp32 shard gradients; undoes clipping and a changed loss scale.

        Needs no reduction: every rank sees the same global norm, which is not finite if any rank's gradient is not.
        """
        if not self._sampling or self.shards.reads_before_clipping:
            return
        factor = self.shards.undo_factor(self._scale_before)
        if math.isnan(factor):
            return
        self.open_sample()
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                for offset, gradient in self.shards.owned_parts(tensor, tensor.grad):
                    self.controller.elements.add(offset, gradient, factor)
