"""MoLS on one DeepSpeed engine: the object behind `engine.mols`.

Attaching puts torch step hooks on the inner optimizer (rates, online samples) and patches `_take_model_step`,
`save_checkpoint` and `load_checkpoint` on the instance; `detach()` undoes it all. Classes and modules stay as they are,
but that what other engines load is looked at (loads.py).
A proxy in the place of DeepSpeed's optimizer was seen to train silently wrong, so there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from mols_ds.core.config import MolsConfig
from mols_ds.core.controller import Context, Controller, window_of_own_loop
from mols_ds.core.groups import GroupTable
from mols_ds.core.log import say, versions
from mols_ds.core.lr_scaler import LRScaler, make_plan
from mols_ds.core.phases import resolve_schedule
from mols_ds.core.ranges import ShardRange
from mols_ds.core.session import Session, largest_holder
from mols_ds.engines.deepspeed.checkpoint import EngineCheckpoints
from mols_ds.engines.deepspeed.checks import check_supported
from mols_ds.engines.deepspeed.loads import check_order
from mols_ds.engines.deepspeed.parallel.find import find_grid
from mols_ds.engines.deepspeed.rng_state import EngineWindow
from mols_ds.engines.deepspeed.shards import Replicated, find_shards
from mols_ds.errors import MolsConfigError
from mols_ds.optim.scheduler_hints import scheduler_hints
from mols_ds.optim.traits import has_shared_counter, is_elementwise, parallel_list, reads_groups_only
from mols_ds.report.files import publisher

Loop = Literal["own", "client", "extra"]
"""Who calls `engine.step()`: the user's own loop; a client's, which asks the optimizer whether the step was skipped
(`overflow`, read by Accelerate); an integration that feeds the samples of mode "probe" as extra batches."""


class EngineMols(Session):
    """MoLS on one engine; `engine.mols`. Made by `attach`.

    In mode "probe", during the calibration, `engine.step()` at an accumulation boundary measures the batch that the
    training loop just ran forward and backward, and does not update: it consumes the next K global batches of the
    user's loop (K = samples), while weights, optimizer state, scheduler, loss scale, `global_steps`, `micro_steps` and
    the random state of dropout end as if those batches had never been run.
    """

    random: EngineWindow

    def __init__(self, engine: Any, config: MolsConfig, loop: Loop = "own") -> None:
        super().__init__(config)
        check_supported(engine, config)
        self.engine = engine
        self.loop = loop
        self._boundary = engine.micro_steps - engine.micro_steps % engine.gradient_accumulation_steps()
        self.grid = find_grid(engine)
        self.random = EngineWindow(self.grid)
        self.source = self.shards = find_shards(engine, self.grid)
        self._check_options()
        schedule = resolve_schedule(config, *scheduler_hints(engine.lr_scheduler))
        late = check_order(engine, schedule, config.fixed_alphas is None)
        table = self.grid.table(config, self.shards.param_group)
        self._controller = Controller(config, table, self.shards.accumulated, schedule, self._context())
        self.check_counts()
        self._lr_group = self._groups_of_lr(table)
        self._scale_before = 1.0
        self._install(table)
        self.checkpoints = EngineCheckpoints(self, engine, self.grid, self.random)
        if late is not None:
            self.controller.warn(late)
        self.controller.advance(engine.global_steps)

    def detach(self) -> None:
        """Take everything off the engine again: it steps as a stock engine from here on."""
        for hook in self._hooks:
            hook.remove()
        self.scaler.remove()
        del self.engine._take_model_step
        self.checkpoints.remove()
        self.controller.elements.free()
        del self.engine.mols

    # ------------------------------------------------------------------ build

    def _install(self, table: GroupTable) -> None:
        """Hooks in this order: sample, then rates, then (after the rates are off again) Adam's moments."""
        engine, shards = self.engine, self.shards
        plans = {
            id(tensor): make_plan(size, ranges, table.layouts)
            for tensor, size, ranges in zip(shards.tensors, shards.sizes, shards.ranges, strict=True)
        }
        self._known = set(plans)
        sample = shards.inner.register_step_pre_hook(self._on_inner_step)
        self.scaler = LRScaler(
            shards.inner,
            plans,
            lambda: self.controller.rates(engine.global_steps),
            elementwise=is_elementwise(shards.inner),
            shared_counter=has_shared_counter(shards.inner),
            groups_only=reads_groups_only(shards.inner),
            parallel_list=parallel_list(shards.inner),
        )
        self.scalers.append(self.scaler)
        self._hooks = [
            sample,
            shards.inner.register_step_post_hook(self._read_moments),
            engine.module.register_forward_pre_hook(self._before_forward),
        ]
        self._ranges: dict[int, list[tuple[int, ShardRange]]] = {}
        for number, (index, item) in enumerate(shards.owned):
            self._ranges.setdefault(id(shards.tensors[index]), []).append((number, item))
        self._take_model_step = engine._take_model_step
        engine._take_model_step = self._step

    def _check_options(self) -> None:
        for group in self.shards.inner.param_groups:
            if group.get("lr") is None:
                raise MolsConfigError("the optimizer's lr is None (it makes its own rate): give it an lr to be scaled")

    def _context(self) -> Context:
        accelerator = get_accelerator()
        on_cpu = self.config.accumulators.device == "cpu"
        return Context(
            reduce=self.reduce,
            device=torch.device("cpu") if on_cpu else torch.device(accelerator.current_device_name()),
            rank=self.engine.global_rank,
            world=self.grid.world,
            versions=versions(self.grid.packages),
            log=say,
            publish=publisher(self.config.report_dir, say),
            announce=self._announce,
        )

    def _announce(self, samples: int) -> str:
        """What a probe window means for this loop; the schedule stands still only where the engine steps it, or where
        the loop asks whether the step was skipped."""
        if self.loop == "extra":
            return (
                f"gradients are measured on {samples} extra batches before the next update; updates, schedule and the "
                "order of the training data are those of a run without MoLS"
            )
        if self.engine.lr_scheduler is not None:
            return window_of_own_loop(samples)
        schedule = f"a schedule that the loop steps itself runs on by {samples} steps meanwhile"
        if self.loop == "client" and hasattr(self.engine.optimizer, "overflow"):
            schedule = (
                "a schedule that waits for optimizer_step_was_skipped (Trainer, Accelerate) stands still, another one "
                f"runs on by {samples} steps meanwhile"
            )
        return (
            f"the next {samples} steps of the training loop measure gradients and do not update; a loop that counts "
            f"its own iterations trains {samples} updates fewer; {schedule}"
        )

    def _groups_of_lr(self, table: GroupTable) -> dict[str, int]:
        """Module group -> index of the parameter group that holds most of its elements."""
        counts = (
            (self.grid.lr_groups[name], layout.counts(0, math.prod(table.shapes[name])))
            for name, layout in table.layouts.items()
            if name in self.grid.lr_groups
        )
        return largest_holder(counts, table.elements)

    # ------------------------------------------------------------------ what the protocol asks

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
        """From any state at hand, else from the step count."""
        inner = self.shards.inner
        counts = [int(state["step"]) for state in inner.state.values() if "step" in state]
        return max(counts, default=max(2, step)), *inner.param_groups[0]["betas"]

    # ------------------------------------------------------------------ steps

    def _step(self, lr_kwargs: Any = None) -> None:
        """In the place of `engine._take_model_step`: measure, or step with the multipliers of this step."""

        def stock() -> bool:
            self._say_skipped(False)
            self._take_model_step(lr_kwargs)
            return bool(self.engine.was_step_applied())

        self.take_step(stock)
        self._boundary = self.engine.micro_steps + 1  # `engine.step` counts this micro-batch after us

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if self.controller.measuring and self.config.mode != "moments" and module.training:
            self.shards.begin()
        super()._before_forward(module, args)

    def _lower_scale(self) -> bool:
        return self.shards.lower_scale()

    def _after_discard(self) -> None:
        if self.grid.counts_micro_steps:  # Accelerate calls `engine.step` at boundaries alone, other loops each time
            self.engine.micro_steps = self._boundary - 1
        self._say_skipped(True)
        self.engine.losses = None

    def _say_skipped(self, skipped: bool) -> None:
        """What Accelerate reads as `optimizer_step_was_skipped`; DeepSpeed's optimizers set it in their own steps."""
        if self.loop == "client" and hasattr(self.engine.optimizer, "overflow"):
            self.engine.optimizer.overflow = skipped

    def _before_step(self) -> None:
        """Online samples of stage 0, whose gradients are clipped before the inner step and whose norm is not kept."""
        self._scale_before = self.shards.loss_scale()
        self._say_what_is_not_scaled()
        if self.wants_sample and isinstance(self.shards, Replicated) and self._all_finite(self.shards):
            self.take_sample()

    def _say_what_is_not_scaled(self) -> None:
        """Warn of weights that a client optimizer of stage 0 steps and that were frozen, or not there, at attach.

        At stages 1 to 3 and in 16 bits DeepSpeed steps copies that it made before, so that such weights never train.
        """
        if self.shards.outer is not self.shards.inner:
            return
        params = (p for group in self.shards.inner.param_groups for p in group["params"])
        new = {id(p) for p in params if p.grad is not None and id(p) not in self._known}
        if not new:
            return
        self._known |= new
        names = [name for name, p in self.engine.module.named_parameters() if id(p) in new]
        self.controller.warn(
            f"{len(new)} weights train that were frozen or not in the optimizer when MoLS was attached "
            f"({', '.join(names[:3]) or 'not of the model'}): they get the base rate and are not measured; call "
            "engine.mols.detach() and mols_ds.attach(engine, ...) again to include them",
            every_rank=True,
        )

    def _all_finite(self, shards: Replicated) -> bool:
        """Whether every gradient is finite, the same on every rank: data-parallel replicas know it alone."""
        return self.agree(shards.finite()) if self.grid.model_parallel else shards.finite()

    def _on_inner_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Online samples of stages 1-3: the fp32 shard gradients, with clipping and a changed loss scale undone.

        Every rank sees the same global norm, which is not finite when any rank's gradient is not: no reduction needed.
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
