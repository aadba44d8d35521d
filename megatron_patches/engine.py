"""MoLS on one Megatron-core optimizer: the object that `megatron_patches.attach` returns.

`attach` registers torch step hooks on the inner optimizers (rates, Adam's moments), replaces `step`, `get_grad_norm`
and the state-dict methods on this `ChainedOptimizer` instance, and registers a forward pre-hook on the model chunks.
It patches no class or module. `detach()` undoes all of it. Parameter groups are not split: during an inner step the
optimizer has temporary groups with lr x multiplier (see `mols_ds.core.lr_scaler`). So `OptimizerParamScheduler`,
logging and checkpoints have the base rate and the stock layout.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_patches import precision
from megatron_patches.checkpoint import MegatronCheckpoints
from megatron_patches.checks import check_supported, find_config
from megatron_patches.collective_checks import check_locals, merge_shapes
from megatron_patches.group_rules import frozen_names
from megatron_patches.param_map import (
    LocalParameter,
    LogicalModel,
    ProcessGrid,
    configs_of,
    current_grid,
    local_layout,
    local_parameters,
)
from megatron_patches.probe_window import MegatronWindow
from megatron_patches.schedule import increment_of, optimizer_steps, scheduler_hints
from megatron_patches.shards import MegatronShards, collective_device
from mols_ds.core.config import MolsConfig
from mols_ds.core.controller import Controller
from mols_ds.core.groups import GroupTable
from mols_ds.core.layout import largest_holder
from mols_ds.core.log import say, versions
from mols_ds.core.lr_scaler import make_plan
from mols_ds.core.new_weights import NewWeights
from mols_ds.core.phases import RateCurve, resolve_schedule
from mols_ds.core.protocols import Context
from mols_ds.core.ranges import ShardRange
from mols_ds.core.rank_checks import check_counts, same_everywhere, together
from mols_ds.core.replaced_methods import ReplacedMethods
from mols_ds.core.session import Session
from mols_ds.errors import MolsConfigError
from mols_ds.optim.rate_curve import rate_curve
from mols_ds.optim.scaling import lr_scaler
from mols_ds.optim.traits import is_elementwise
from mols_ds.report.files import Publisher


class MegatronMols(Session):
    """MoLS on one `ChainedOptimizer` and its model chunks. Create it with `attach`, collectively on all ranks.

    In mode "probe", during the calibration, `optimizer.step()` measures the training loop's gradient, does not update
    and returns `(False, None, None)`. The loop treats it as a skipped iteration (as after an fp16 overflow) and does
    not step the scheduler. After the window, weights, buffers (expert biases of routers too), optimizer state and RNG
    state are as before these batches (docs/method.md, "What a probe restores").
    """

    window: MegatronWindow

    def __init__(
        self,
        model_chunks: Sequence[nn.Module],
        optimizer: Any,
        scheduler: Any,
        config: MolsConfig,
        samples_per_step: int | None,
    ) -> None:
        super().__init__(config)
        self.optimizer = optimizer
        locals_: list[LocalParameter] = []

        def collect() -> list[Any]:
            self.grid = current_grid()
            locals_.extend(local_parameters(model_chunks, self.grid))
            names = {local.name: local.shape for local in locals_ if local.names_it}
            frozen = [name for chunk in model_chunks for name in frozen_names(chunk)]
            return [names, optimizer_steps(optimizer), configs_of(model_chunks), frozen]

        gathered = together(collect)
        # This rank's own configs last: where ranks disagree, the checksums of their layouts differ.
        modules = {name: config for rank in gathered for name, config in rank[2].items()} | configs_of(model_chunks)
        frozen = list(dict.fromkeys(name for rank in gathered for name in rank[3]))
        model = LogicalModel(merge_shapes([rank[0] for rank in gathered]), modules, frozen)
        self._updates = max(int(rank[1]) for rank in gathered)

        def build() -> list[Any]:
            curve = partial(rate_curve, scheduler, increment=increment_of(samples_per_step))
            self._build(model_chunks, locals_, model, scheduler_hints(scheduler, samples_per_step), curve)
            schedule, layouts = self.controller.state.schedule, self.controller.table.layouts
            return [repr(schedule), zlib.crc32(repr(sorted(layouts.items())).encode())]

        same_everywhere(together(build), ["the schedule of MoLS", "the checksum of the parameters' layouts"])
        table = self.controller.table
        check_counts(table, self.controller.elements, self.reduce)
        self.window = MegatronWindow(model_chunks)
        self._install(model_chunks, table)
        self.checkpoints = MegatronCheckpoints(self, optimizer, self.window, self._count_from)
        self.controller.advance(self.steps)

    def resume_from(self, checkpoint_dir: str) -> None:
        """Load the accumulators of an unfinished calibration in the next load, where this checkpoint has them.

        Call it before `optimizer.sharded_state_dict(..., is_loading=True)`. `apply()` calls it automatically. Without
        it an unfinished calibration starts over, with a warning.
        """
        self.checkpoints.resume_from(checkpoint_dir)

    def detach(self) -> None:
        """Detach: the optimizer steps as stock Megatron from here on. A second call does nothing."""
        if self.optimizer.__dict__.get("mols") is not self:
            return
        self._release()
        self._methods.undo()
        del self.optimizer.mols
        self.checkpoints.remove()
        self._publisher.release()

    # ------------------------------------------------------------------ build

    def _build(
        self,
        model_chunks: Sequence[nn.Module],
        locals_: Sequence[LocalParameter],
        model: LogicalModel,
        hints: tuple[int | None, int | None],
        curve: RateCurve,
    ) -> None:
        """Build this rank's state. All ranks raise an error of any rank."""
        optimizer, config = self.optimizer, self.config
        check_locals(locals_, model.shapes)
        self.model_config = find_config(model_chunks)
        table = model.table(self.model_config, config.rules, config.granularity)
        fused = any(len(local_layout(local, table.layouts).groups) > 1 for local in locals_)
        check_supported(optimizer, self.model_config, config, fused=fused)
        self.source = self.shards = MegatronShards(optimizer, locals_, self.grid)
        schedule = resolve_schedule(config, *hints, curve)
        if self.steps > schedule.start and config.fixed_alphas is None:
            raise MolsConfigError(
                f'"mols.start" is step {schedule.start}, but the optimizer has taken {self.steps} already: attach '
                "MoLS before training and before a checkpoint is loaded, or set a later start"
            )
        self._controller = Controller(config, table, self.shards.accumulated, schedule, self._context())

    def _context(self) -> Context:
        grid: ProcessGrid = self.grid
        self._publisher = Publisher(self.config.report_dir, say)
        on_cpu = self.config.accumulators.device == "cpu"
        return Context(
            reduce=self.reduce,
            device=torch.device("cpu") if on_cpu else collective_device(),
            rank=dist.get_rank(),
            world={"data": grid.data, "tensor": grid.tensor, "pipeline": grid.pipeline, "expert": grid.expert},
            versions=versions(("megatron-core", "transformer-engine"))
            | precision.describe(self.model_config, self.optimizer),
            log=say,
            publish=self._publisher,
            reduce_max=self.shards.reduce_max,
        )

    def _install(self, model_chunks: Sequence[nn.Module], table: GroupTable) -> None:
        counts = []
        for number, part in enumerate(self.shards.parts):
            if part.inner is None:
                continue
            plans = {id(tensor): make_plan(tensor.numel(), [], table.layouts) for tensor in part.idle}
            elementwise = is_elementwise(part.inner)
            for shard in part.shards:
                item = shard.range
                plans[id(shard.tensor)] = make_plan(item.numel, [item], table.layouts, elementwise=elementwise)
                counts.append(((number, shard.group), table.layouts[item.name].counts(item.start, item.numel)))
            self.scalers.append(
                lr_scaler(part.inner, plans, lambda: self.controller.rates(self.steps), self.config.weight_decay)
            )
            self._hooks.append(part.inner.register_step_post_hook(self._read_moments))
        early = "unfreeze them before DistributedDataParallel and get_megatron_optimizer"
        again = "call mols.detach() and megatron_patches.attach(...) again"
        params = (p for chunk in model_chunks for p in chunk.parameters())
        held = [p for p in params if not p.requires_grad and hasattr(p, "main_grad")]  # parameters in DDP's buffers
        self.new_weights = NewWeights(model_chunks, self.scalers, include=early, train=early, held=held, again=again)
        first = next(((i, 0) for i, part in enumerate(self.shards.parts) if part.inner is not None), None)
        # A group without elements on this rank gets the rate of the first parameter group.
        holders = dict.fromkeys(table.elements, first) if first is not None else {}
        self._lr_group = {**holders, **largest_holder(counts, table.elements)}
        self._ranges: dict[int, list[tuple[int, ShardRange]]] = {}
        for number, (shard, item) in enumerate(self.shards.owned):
            self._ranges.setdefault(id(shard.tensor), []).append((number, item))
        self._hooks += [hook for chunk in model_chunks for hook in self._watch_passes(chunk)]
        self._methods = ReplacedMethods(self.optimizer)
        self._stock_step = self._methods.set("step", self._step)
        self._stock_norm = self._methods.set("get_grad_norm", self._grad_norm)
        self.optimizer.mols = self

    # ------------------------------------------------------------------ methods of the protocol

    @property
    def steps(self) -> int:
        """Optimizer updates so far, without skipped iterations; the unit of "mols.start" and "mols.ramp_end"."""
        return self._updates

    def _count_from(self, steps: int) -> None:
        """Set the number of updates after loading a checkpoint."""
        self._updates = steps

    def base_lrs(self) -> dict[str, float]:
        parts = self.shards.parts
        return {
            group: float(parts[part].outer.optimizer.param_groups[index]["lr"])
            for group, (part, index) in self._lr_group.items()
        }

    def owned_in(self, tensor: Tensor) -> Sequence[tuple[int, ShardRange]]:
        return self._ranges.get(id(tensor), ())

    def adam_settings(self, step: int) -> tuple[int, float, float]:
        config = self.optimizer.config
        return max(2, step), config.adam_beta1, config.adam_beta2

    # ------------------------------------------------------------------ steps

    @torch.no_grad()
    def _step(self) -> tuple[bool, Any, Any]:
        """Replace `ChainedOptimizer.step`: measure, or step with the current multipliers."""
        result: tuple[bool, Any, Any] = (False, None, None)

        def stock() -> bool:
            nonlocal result
            result = self._stock_step()
            self._updates += bool(result[0])
            return bool(result[0])

        self.take_step(stock)
        return result

    def _prepare_probe(self) -> bool:
        """Unscale the reduced gradient in place. The loop zeroes it before the next iteration."""
        found = (getattr(outer, "grad_scaler", None) for outer in self.optimizer.chained_optimizers)
        scalers = {id(scaler): scaler for scaler in found if scaler is not None}
        self._loss_scales = [(scaler, scaler.state_dict()) for scaler in scalers.values()]
        return not self.optimizer.prepare_grads()

    def _after_discard(self, usable: bool) -> None:
        """Lower the loss scale after a non-finite sample. It does not grow in the window."""
        if usable:
            for scaler, state in self._loss_scales:
                scaler.load_state_dict(state)
        self._loss_scales = []

    def _grad_norm(self) -> Any:
        """Replace `get_grad_norm`, which Megatron calls between `prepare_grads` and clipping.

        The norm is equal on all ranks, and non-finite for any non-finite gradient. So all ranks skip a bad sample
        without an extra reduction.
        """
        norm = self._stock_norm()
        if self.wants_sample and math.isfinite(float(norm)):
            self.take_sample()
        return norm
