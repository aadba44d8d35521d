"""MoLS on one DeepSpeed engine: the object behind `engine.mols`.

Attaching puts torch step hooks on the inner optimizer (rates, online samples) and patches `_take_model_step`,
`save_checkpoint` and `load_checkpoint` on the instance. No class and no module is patched; `detach()` undoes it all.
A proxy in the place of DeepSpeed's optimizer was seen to train silently wrong, so there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from mols_ds.core.config import MolsConfig
from mols_ds.core.controller import Context, Controller
from mols_ds.core.group_stats import NoiseFloor, adam_moments
from mols_ds.core.groups import GroupTable
from mols_ds.core.handle import Attached
from mols_ds.core.local_stats import Owned
from mols_ds.core.log import say, versions
from mols_ds.core.lr_scaler import LRScaler, Piece, make_plan
from mols_ds.core.phases import resolve_schedule
from mols_ds.engines.deepspeed.checkpoint import Checkpoints
from mols_ds.engines.deepspeed.checks import check_supported, scheduler_hints
from mols_ds.engines.deepspeed.parallel.base import find_grid
from mols_ds.engines.deepspeed.shards import Replicated, find_shards
from mols_ds.errors import MolsConfigError
from mols_ds.optim.traits import has_shared_counter, is_elementwise


class EngineMols(Attached):
    """MoLS on one engine; `engine.mols`. Made by `attach`.

    In mode "probe", during the calibration, `engine.step()` at an accumulation boundary measures the batch that the
    training loop just ran forward and backward, and does not update: it consumes the next K global batches of the
    user's loop (K = samples), while weights, optimizer state, scheduler, loss scale, `global_steps`, `micro_steps` and
    the random state of dropout end as if those batches had never been run.
    """

    def __init__(self, engine: Any, config: MolsConfig) -> None:
        check_supported(engine, config)
        self.engine = engine
        self.config = config
        self.grid = find_grid(engine)
        self.shards = find_shards(engine, self.grid.places)
        self._check_options()
        total, warmup = scheduler_hints(engine.lr_scheduler)
        schedule = resolve_schedule(config, total, warmup)
        table = self.grid.table(config, self.shards.param_group)
        self.controller = Controller(config, table, self._owned(), schedule, self._context())
        self.check_counts()
        self._lr_group = self._groups_of_lr(table)
        plans = {
            id(tensor): make_plan(size, pieces, table.layouts)
            for tensor, size, pieces in zip(self.shards.tensors, self.shards.sizes, self.shards.pieces, strict=True)
        }
        self._sampling = False
        self._sampled = False
        self._scale_before = 1.0
        self._random: tuple[Tensor, Tensor] | None = None
        self._hooks = [
            self.shards.inner.register_step_pre_hook(self._on_inner_step),
        ]
        inner = self.shards.inner
        self.scaler = LRScaler(
            inner,
            plans,
            lambda: self.controller.rates(engine.global_steps),
            elementwise=is_elementwise(inner),
            shared_counter=has_shared_counter(inner),
        )
        self._hooks += [
            self.shards.inner.register_step_post_hook(self._after_inner_step),
            engine.module.register_forward_pre_hook(self._before_forward),
        ]
        self._take_model_step = engine._take_model_step
        engine._take_model_step = self._step
        self.checkpoints = Checkpoints(self)
        self.controller.advance(engine.global_steps)

    def detach(self) -> None:
        """Take everything off the engine again: it steps as a stock engine from here on."""
        self.scaler.remove()
        for hook in self._hooks:
            hook.remove()
        del self.engine._take_model_step
        self.checkpoints.remove()
        self.controller.elements.free()
        del self.engine.mols

    # ------------------------------------------------------------------ build

    def _check_options(self) -> None:
        for group in self.shards.inner.param_groups:
            if group.get("lr") is None:
                raise MolsConfigError("the optimizer's lr is None (it makes its own rate): give it an lr to be scaled")

    def _owned(self) -> list[Owned]:
        owned, offset = [], 0
        for _, piece in self.shards.owned:
            owned.append(Owned(piece.name, piece.start, offset, piece.numel))
            offset += piece.numel
        return owned

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
        )

    def _groups_of_lr(self, table: GroupTable) -> dict[str, int]:
        """Module group -> index of the parameter group that holds most of its elements."""
        held: dict[str, dict[int, int]] = {group: {} for group in table.elements}
        for name, layout in table.layouts.items():
            index = self.grid.lr_groups.get(name)
            if index is None:
                continue
            for group, count in layout.counts(0, math.prod(table.shapes[name])).items():
                held[group][index] = held[group].get(index, 0) + count
        return {group: max(by_index, key=lambda i: by_index[i]) for group, by_index in held.items() if by_index}

    # ------------------------------------------------------------------ communication

    def reduce(self, values: Tensor) -> Tensor:
        """SUM over the ranks whose owned elements are disjoint. 1-D float64 in, CPU float64 out."""
        device = values.to(get_accelerator().current_device_name())
        dist.all_reduce(device, op=dist.ReduceOp.SUM, group=self.grid.group)
        return device.cpu()

    # ------------------------------------------------------------------ steps

    def _base_lrs(self) -> dict[str, float]:
        groups = self.shards.inner.param_groups
        return {group: float(groups[index]["lr"]) for group, index in self._lr_group.items()}

    def _step(self, lr_kwargs: Any = None) -> None:
        """In the place of `engine._take_model_step`: measure, or step with the multipliers of this step."""
        controller, engine = self.controller, self.engine
        t = engine.global_steps
        if controller.discards_steps:
            self._probe(t)
            return
        base = self._base_lrs()
        self._begin_sample()
        reads_moments = controller.reads_moments_next
        try:
            self._take_model_step(lr_kwargs)
        finally:
            self.scaler.restore()
        if engine.was_step_applied():
            controller.applied(t, base)
        self._end_sample(engine.global_steps, reads_moments)
        controller.advance(engine.global_steps)

    def _probe(self, t: int) -> None:
        """Measure this boundary's gradient and throw it away. Adds one 8-byte reduction in the place of the norm's."""
        shards, controller, engine = self.shards, self.controller, self.engine
        finite = all(bool(torch.isfinite(gradient).all()) for _, gradient in shards.read())
        usable = self.agree(finite)
        if usable:
            scale = 1.0 / shards.loss_scale()
            controller.elements.open()
            for offset, gradient in shards.read():
                controller.elements.add(offset, gradient, scale)
        shards.discard()
        if self.grid.counts_micro_steps:
            engine.micro_steps -= engine.gradient_accumulation_steps()
        engine.losses = None
        controller.close_sample(t, usable=usable)
        if not controller.discards_steps:
            self._restore_random()
        controller.advance(t)

    def _begin_sample(self) -> None:
        controller, shards = self.controller, self.shards
        self._sampling = controller.measuring and self.config.mode == "online"
        self._sampled = False
        self._scale_before = shards.loss_scale()
        if self._sampling and isinstance(shards, Replicated) and self._all_finite(shards):
            controller.elements.open()
            for offset, gradient in shards.read():
                controller.elements.add(offset, gradient, 1.0)
            self._sampled = True

    def _all_finite(self, shards: Replicated) -> bool:
        """Whether every gradient is finite, the same on every rank: data-parallel replicas know it alone."""
        return self.agree(shards.finite()) if self.grid.model_parallel else shards.finite()

    def _end_sample(self, t: int, reads_moments: bool) -> None:
        controller = self.controller
        if self._sampling:
            self._sampling = False
            controller.close_sample(t, usable=self._sampled)
        elif controller.measuring and self.config.mode == "moments":
            controller.count(t, usable=True)
            if controller.elements.has_squares:
                controller.close_moments(t)
            elif reads_moments:
                controller.give_up(t, "the optimizer step in which Adam's moments were to be read was skipped")

    def _on_inner_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Online samples of stages 1-3: the fp32 shard gradients, with clipping and a changed loss scale undone.

        Every rank sees the same global norm, which is not finite when any rank's gradient is not: no reduction needed.
        """
        if not self._sampling or self.shards.reads_before_clipping:
            return
        factor = self.shards.undo_factor(self._scale_before)
        if math.isnan(factor):
            return
        if not self._sampled:
            self.controller.elements.open()
            self._sampled = True
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                for offset, gradient in self.shards.spans.cut(tensor, tensor.grad):
                    self.controller.elements.add(offset, gradient, factor)

    def _after_inner_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Mode "moments": group sums of Adam's moments while the state of these tensors is at hand (NVMe)."""
        if not self.controller.reads_moments_next:
            return
        first: dict[int, list[tuple[int, Piece]]] = {}
        for number, (i, piece) in enumerate(self.shards.owned):
            first.setdefault(id(self.shards.tensors[i]), []).append((number, piece))
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                for number, piece in first.get(id(tensor), []):
                    self._add_moments(group, optimizer.state[tensor], number, piece.offset, piece.numel)
        if not self.controller.elements.has_squares:
            self.controller.elements.open_squares(NoiseFloor(1.0, self._moment_weight(optimizer)))

    def _add_moments(self, group: Mapping[str, Any], state: Mapping[str, Any], number: int, lo: int, n: int) -> None:
        mean = state["exp_avg"].view(-1)[lo : lo + n]
        square = state["exp_avg_sq"].view(-1)[lo : lo + n]
        step = int(state.get("step", group.get("step", 0)))
        mu2, s2, c = adam_moments(mean, square, step, *group["betas"])
        if not self.controller.elements.has_squares:
            self.controller.elements.open_squares(NoiseFloor(1.0, c))
        self.controller.elements.add_squares(number, mu2, s2)

    def _moment_weight(self, optimizer: Any) -> float:
        """c of a rank that owns nothing of this inner step: from any state at hand, else from the step count."""
        beta1, beta2 = optimizer.param_groups[0]["betas"]
        steps = [int(s["step"]) for s in optimizer.state.values() if "step" in s]
        step = max(steps, default=max(2, self.engine.global_steps + 1))
        return adam_moments(torch.zeros(1), torch.zeros(1), step, beta1, beta2)[2]

    # ------------------------------------------------------------------ random state of a probe window

    def _before_forward(self, module: Any, args: Any) -> None:
        """At the first forward pass of a probe window: remember the random state."""
        if self._random is None and self.controller.discards_steps and module.training:
            self._random = (torch.get_rng_state(), get_accelerator().get_rng_state())
            self.grid.begin_window()

    def _restore_random(self) -> None:
        if self._random is not None:
            torch.set_rng_state(self._random[0])
            get_accelerator().set_rng_state(self._random[1])
            self._random = None
            self.grid.end_window()
