"""MoLS on one Megatron-core optimizer: the object that `megatron_patches.attach` returns.

Attaching puts torch step hooks on the inner optimizers (rates, Adam's moments), replaces `step`, `get_grad_norm` and
the state-dict methods on the one `ChainedOptimizer` instance, and puts a forward pre-hook on the model chunks. No class
and no module is patched; `detach()` undoes it all. Parameter groups are not split: during each inner step the optimizer
sees temporary groups with lr x multiplier (see `mols_ds.core.lr_scaler`), so that `OptimizerParamScheduler`, logging
and checkpoints have the base rate and the stock layout.
"""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_patches import precision
from megatron_patches.checkpoint import Checkpoints
from megatron_patches.checks import check_supported, find_config, optimizer_steps, scheduler_hints
from megatron_patches.collective_checks import Shapes, check_locals, merge_shapes, same_everywhere, together
from megatron_patches.param_map import (
    Grid,
    LocalParameter,
    current_grid,
    local_layout,
    local_parameters,
    logical_table,
)
from megatron_patches.rng_state import RandomState
from megatron_patches.shards import Shards
from mols_ds.core.config import MolsConfig
from mols_ds.core.controller import Context, Controller
from mols_ds.core.group_stats import NoiseFloor, adam_moments
from mols_ds.core.groups import GroupTable
from mols_ds.core.handle import Attached
from mols_ds.core.log import say, versions
from mols_ds.core.lr_scaler import LRScaler, make_plan
from mols_ds.core.phases import resolve_schedule
from mols_ds.errors import MolsConfigError
from mols_ds.optim.traits import has_shared_counter, is_elementwise


class MegatronMols(Attached):
    """MoLS on one `ChainedOptimizer` and its model chunks. Made by `attach`, collectively on all ranks.

    In mode "probe", during the calibration, `optimizer.step()` measures the gradient that the training loop just
    computed, does not update and returns `(False, None, None)`: to the loop it is one of Megatron's own skipped
    iterations (as after an fp16 overflow), for which it does not step the scheduler. Weights, optimizer state and the
    random state of dropout end the window as if those batches had never been run.

    Attributes:
        steps: optimizer updates so far, skipped iterations not counted; what "mols.start" and "mols.ramp_end" count.
        random: the random state that a probe window gives back at its end.
    """

    def __init__(
        self,
        model_chunks: Sequence[nn.Module],
        optimizer: Any,
        scheduler: Any,
        config: MolsConfig,
        samples_per_step: int | None,
    ) -> None:
        self.optimizer = optimizer
        self.config = config
        locals_: list[LocalParameter] = []

        def collect() -> list[Any]:
            self.grid = current_grid()
            locals_.extend(local_parameters(model_chunks, self.grid))
            names = {local.name: local.shape for local in locals_ if local.names_it}
            return [names, optimizer_steps(optimizer)]

        told = together(collect)
        shapes = merge_shapes([rank[0] for rank in told])
        self.steps = max(int(rank[1]) for rank in told)

        def build() -> list[Any]:
            self._build(model_chunks, locals_, shapes, scheduler_hints(scheduler, samples_per_step))
            schedule, layouts = self.controller.state.schedule, self.controller.table.layouts
            return [repr(schedule), zlib.crc32(repr(sorted(layouts.items())).encode())]

        same_everywhere(together(build), ["the schedule of MoLS", "the checksum of the parameters' layouts"])
        table = self.controller.table
        self.check_counts()
        self._sampling = self._sampled = self._stepping = False
        self._adam_step = 0
        self.random = RandomState()
        self._hooks: list[Any] = []
        self.scalers: list[LRScaler] = []
        self._stock_step, self._stock_norm = optimizer.step, optimizer.get_grad_norm
        self._install(model_chunks, table)
        self.checkpoints = Checkpoints(self)
        self.controller.advance(self.steps)

    def resume_from(self, checkpoint_dir: str) -> None:
        """Ask the next load for the accumulators of a half-done calibration too, if this checkpoint has them.

        Call it before `optimizer.sharded_state_dict(..., is_loading=True)`; `apply()` does it by itself. Without it a
        checkpoint from the middle of a calibration loads too, but the calibration starts over, with a warning.
        """
        self.checkpoints.resume_from(checkpoint_dir)

    def detach(self) -> None:
        """Take everything off again: the optimizer steps as stock Megatron from here on."""
        for scaler in self.scalers:
            scaler.remove()
        for hook in self._hooks:
            hook.remove()
        for name in ("step", "get_grad_norm", "mols"):
            self.optimizer.__dict__.pop(name, None)
        self.checkpoints.remove()
        self.controller.elements.free()

    # ------------------------------------------------------------------ build

    def _build(
        self,
        model_chunks: Sequence[nn.Module],
        locals_: Sequence[LocalParameter],
        shapes: Shapes,
        hints: tuple[int | None, int | None],
    ) -> None:
        """What this rank builds by itself; whatever it raises, the other ranks raise too."""
        optimizer, config = self.optimizer, self.config
        check_locals(locals_, shapes)
        self.model_config = find_config(model_chunks)
        table = logical_table(shapes, self.model_config, config.rules, config.granularity)
        fused = any(len(local_layout(local, table.layouts).groups) > 1 for local in locals_)
        check_supported(optimizer, self.model_config, config, fused=fused)
        self.shards = Shards(optimizer, locals_, self.grid)
        schedule = resolve_schedule(config, *hints)
        if self.steps > schedule.start and config.fixed_alphas is None:
            raise MolsConfigError(
                f'"mols.start" is step {schedule.start}, but the optimizer has taken {self.steps} already: attach '
                "MoLS before training and before a checkpoint is loaded, or set a later start"
            )
        self.device = _collective_device()
        self.controller = Controller(config, table, self.shards.pieces(), schedule, self._context())

    def _context(self) -> Context:
        grid: Grid = self.grid
        on_cpu = self.config.accumulators.device == "cpu"
        return Context(
            reduce=self.reduce,
            device=torch.device("cpu") if on_cpu else self.device,
            rank=dist.get_rank(),
            world={"data": grid.data, "tensor": grid.tensor, "pipeline": grid.pipeline, "expert": grid.expert},
            versions=versions(("megatron-core", "transformer-engine")) | self._precision(),
            log=say,
        )

    def _precision(self) -> dict[str, str]:
        return precision.as_versions(precision.describe(self.model_config, self.optimizer))

    def _install(self, model_chunks: Sequence[nn.Module], table: GroupTable) -> None:
        held: dict[str, dict[tuple[int, int], int]] = {group: {} for group in table.elements}
        for number, part in enumerate(self.shards.parts):
            if part.inner is None:
                continue
            plans = {}
            for shard in part.shards:
                plans[id(shard.tensor)] = make_plan(shard.numel, [shard.piece], table.layouts)
                for group, count in table.layouts[shard.local.name].counts(shard.start, shard.numel).items():
                    key = (number, shard.group)
                    held[group][key] = held[group].get(key, 0) + count
            self.scalers.append(
                LRScaler(
                    part.inner,
                    plans,
                    lambda: self.controller.rates(self.steps),
                    elementwise=is_elementwise(part.inner),
                    shared_counter=has_shared_counter(part.inner),
                )
            )
            self._hooks.append(part.inner.register_step_post_hook(self._after_inner_step))
        first = next(((i, 0) for i, part in enumerate(self.shards.parts) if part.inner is not None), None)
        self._lr_group = {
            group: max(keys, key=lambda key: keys[key]) if keys else first for group, keys in held.items()
        }
        self._hooks += [chunk.register_forward_pre_hook(_weak(self._before_forward)) for chunk in model_chunks]
        self.optimizer.step, self.optimizer.get_grad_norm = self._step, self._grad_norm
        self.optimizer.mols = self

    # ------------------------------------------------------------------ communication

    def reduce(self, values: Tensor) -> Tensor:
        """SUM over all ranks, whose owned elements are disjoint. 1-D float64 in, CPU float64 out."""
        moved = values.to(self.device)
        dist.all_reduce(moved)
        return moved.cpu()

    # ------------------------------------------------------------------ steps

    def _base_lrs(self) -> dict[str, float]:
        lrs = {}
        for group, key in self._lr_group.items():
            if key is not None:
                lrs[group] = float(self.shards.parts[key[0]].outer.optimizer.param_groups[key[1]]["lr"])
        return lrs

    @torch.no_grad()
    def _step(self) -> tuple[bool, Any, Any]:
        """In the place of `ChainedOptimizer.step`: measure, or step with the multipliers of this step."""
        controller = self.controller
        if controller.discards_steps:
            self._probe()
            return False, None, None
        base = self._base_lrs()
        self._sampling, self._sampled = controller.measuring and self.config.mode == "online", False
        reads_moments = controller.reads_moments_next
        self._adam_step = self.steps + 1
        self._stepping = True
        try:
            result: tuple[bool, Any, Any] = self._stock_step()
        finally:
            self._stepping = False
            for scaler in self.scalers:
                scaler.restore()
        if result[0]:
            controller.applied(self.steps, base)
            self.steps += 1
        self._end_sample(bool(result[0]), reads_moments)
        controller.advance(self.steps)
        return result

    def _probe(self) -> None:
        """Measure the reduced, unscaled, unclipped gradient and leave it: the loop zeroes it before the next one."""
        controller = self.controller
        overflow = bool(self.optimizer.prepare_grads())
        usable = self.agree(not overflow and self.shards.finite())
        if usable:
            self._add_sample()
        controller.close_sample(self.steps, usable=usable)
        if not controller.discards_steps:
            self.random.restore()
        controller.advance(self.steps)

    def _add_sample(self) -> None:
        elements = self.controller.elements
        elements.open()
        for offset, gradient in self.shards.read():
            elements.add(offset, gradient, 1.0)

    def _grad_norm(self) -> Any:
        """In the place of `get_grad_norm`, which Megatron calls between `prepare_grads` and clipping.

        The norm is the same on every rank and not finite where any gradient is not, so that a bad sample is left out
        everywhere without a reduction of ours.
        """
        norm = self._stock_norm()
        if self._sampling and not self._sampled and math.isfinite(float(norm)):
            self._add_sample()
            self._sampled = True
        return norm

    def _end_sample(self, updated: bool, reads_moments: bool) -> None:
        controller = self.controller
        if self._sampling:
            self._sampling = False
            controller.close_sample(self.steps, usable=self._sampled)
        elif controller.measuring and self.config.mode == "moments" and updated:
            controller.count(self.steps, usable=True)
            if reads_moments:
                self._open_squares()
                controller.close_moments(self.steps)

    # ------------------------------------------------------------------ mode "moments"

    def _open_squares(self) -> None:
        """Every rank opens, also one whose inner optimizers hold nothing."""
        if self.controller.elements.has_squares:
            return
        config = self.optimizer.config
        zero = torch.zeros(1)
        c = adam_moments(zero, zero, max(2, self._adam_step), config.adam_beta1, config.adam_beta2)[2]
        self.controller.elements.open_squares(NoiseFloor(1.0, c))

    def _after_inner_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Group sums of Adam's moments, right after the inner step that ends the window.

        Not after the dummy steps with which Megatron allocates states before a load.
        """
        if not (self._stepping and self.controller.reads_moments_next):
            return
        self._open_squares()
        for number, owned in enumerate(self.shards.owned):
            shard = owned.shard
            state = optimizer.state.get(shard.tensor)
            if not state or "exp_avg" not in state:
                continue
            group = optimizer.param_groups[shard.group]
            step = int(state.get("step", group.get("step", self._adam_step)))
            mean, square = (
                state[key].detach().reshape(-1).narrow(0, owned.first, owned.numel) for key in ("exp_avg", "exp_avg_sq")
            )
            mu2, s2, _ = adam_moments(mean, square, step, *group["betas"])
            self.controller.elements.add_squares(number, mu2, s2)

    # ------------------------------------------------------------------ random state of a probe window

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        """At the first forward pass of a probe window: remember the random state, to give it back at the end."""
        if self.controller.discards_steps and module.training:
            self.random.remember()


def _collective_device() -> torch.device:
    """Where this rank's gradients and collectives are."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _weak(method: Callable[[nn.Module, Any], None]) -> Callable[[nn.Module, Any], None]:
    """The method without holding its object: Megatron's DDP is never collected (its hooks hold it through C++)."""
    reference = weakref.WeakMethod(method)

    def hook(module: nn.Module, args: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(module, args)

    return hook
