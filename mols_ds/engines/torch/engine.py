"""MoLS on plain torch optimizers: `optimizer.mols`.

Attaching adds torch step hooks to the optimizers (rates, Adam's moments), replaces `step` on the instances, and adds
forward hooks to the model for mode "probe". `detach()` undoes all of it. Classes and modules stay unchanged.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from mols_ds.core.config import MolsConfig
from mols_ds.core.controller import Controller
from mols_ds.core.groups import group_table
from mols_ds.core.layout import largest_holder
from mols_ds.core.log import say, versions
from mols_ds.core.lr_scaler import make_plan
from mols_ds.core.new_weights import NewWeights, without_untrained
from mols_ds.core.phases import resolve_schedule
from mols_ds.core.protocols import Context, OpenStep
from mols_ds.core.ranges import ShardRange
from mols_ds.core.rank_checks import check_counts, same_everywhere, together
from mols_ds.core.replaced_methods import ReplacedMethods
from mols_ds.core.resume_rules import section_of
from mols_ds.core.session import Session
from mols_ds.engines.torch.callers import by_grad_scaler, by_state_dict
from mols_ds.engines.torch.checkpoint import TorchCheckpoints
from mols_ds.engines.torch.checks import check_supported, unwrapped
from mols_ds.engines.torch.gradient_watch import CHANGED, SCALED, GradientWatch
from mols_ds.engines.torch.loss_scaler import LossScaler
from mols_ds.engines.torch.shards import TorchShards, tensor_parallel, this_rank
from mols_ds.engines.torch.window import TorchWindow
from mols_ds.errors import MolsConfigError, MolsError
from mols_ds.optim.scaling import lr_scaler
from mols_ds.optim.traits import is_elementwise
from mols_ds.report.files import Publisher

END = "start and end of the ramp (total_steps)"


class TorchMols(Session):
    """MoLS on the optimizers of one model. Created by `attach`, collectively on all ranks.

    In mode "probe", during the calibration, `optimizer.step()` measures the gradient of the loop's batch and does not
    update. Weights, buffers, optimizer state and the random numbers of the model end as if those batches had never run
    (docs/method.md, "What a probe restores"). A scheduler, a counter or a loader of the loop goes on.

    With several optimizers, one step is one call of each one's `step()`.
    """

    window: TorchWindow

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        model: nn.Module,
        config: MolsConfig,
        total_steps: int | None,
        grad_scaler: torch.amp.GradScaler | None,
        announce: Callable[[int], str],
    ) -> None:
        super().__init__(config)
        self.model, self.optimizers, self._announce = model, list(optimizers), announce
        self._updates = 0
        self._round: set[int] = set()  # optimizers that have stepped in the current step
        self._discarding = self._updated = False
        self._opened: OpenStep | None = None
        self._loaded: set[str] = set()  # since the last step: "optimizer", "mols"
        self._early: bool | None = None  # result of `read_gradients` for the current step
        self._read_after = 0  # backward passes before it

        def build() -> list[object]:
            self._build(total_steps)
            shapes = zlib.crc32(
                repr(sorted((n, s, self._table.layouts[n]) for n, s in self._table.shapes.items())).encode()
            )
            section = {key: value for key, value in section_of(config).items() if key != "report_dir"}
            return [section, shapes, self._updates, [self._schedule.start, self._schedule.ramp_end]]

        same_everywhere(
            together(build),
            ['the "mols" section', "the checksum of the model's parameters", "the optimizer's steps", END],
        )
        params = {name: p for name, p in self._named() if name in self._table.layouts}
        self.source = self.shards = TorchShards(params, self._table, self.optimizers)
        self._controller = Controller(config, self._table, self.shards.accumulated, self._schedule, self._context())
        check_counts(self._table, self.controller.elements, self.reduce)
        self.window = TorchWindow(unwrapped(model), self._device)
        self.watch = GradientWatch(params.values())
        self.loss_scaler = None if grad_scaler is None else LossScaler(grad_scaler, self.watch)
        self._install()
        self.checkpoints = TorchCheckpoints(self, self.shards, functools.partial(setattr, self, "_updates"))
        self.controller.advance(self.steps)
        self._follow()

    def detach(self) -> None:
        """Remove MoLS: the optimizers step as stock ones from now on. A second call does nothing."""
        if getattr(self.optimizers[0], "mols", None) is not self:
            return
        self._release()
        self.watch.stop()
        for methods in [*self._methods, *([] if self.loss_scaler is None else [self.loss_scaler.methods])]:
            methods.undo()
        self._publisher.release()
        for optimizer in self.optimizers:
            del optimizer.mols

    # ------------------------------------------------------------------ build

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        """The model's trainable parameters by name, without the prefixes of DDP and torch.compile."""
        return [(name, p) for name, p in unwrapped(self.model).named_parameters() if p.requires_grad]

    def _build(self, total_steps: int | None) -> None:
        """Check this rank's optimizers and model. All ranks raise an error of any rank."""
        config = self.config
        check_supported(self.optimizers, self.model, config)
        self._group_of = {
            id(p): (number, index)
            for number, optimizer in enumerate(self.optimizers)
            for index, group in enumerate(optimizer.param_groups)
            for p in group["params"]
        }
        named = self._named()
        held = {name: self._group_of[id(p)] for name, p in named if id(p) in self._group_of}
        if not held:
            raise MolsConfigError(
                "mols_ds.attach: no trainable parameter of this model is in the optimizer: pass the model that the "
                "optimizer was built from, and build the optimizer after fully_shard and parallelize_module"
            )
        self._device = next(p.device for _, p in named)
        table = group_table(unwrapped(self.model), config.rules, config.granularity)
        self._table = without_untrained(table, held, this_rank())
        counts = (
            (held[n], layout.counts(0, math.prod(self._table.shapes[n]))) for n, layout in self._table.layouts.items()
        )
        self._lr_group = largest_holder(counts, self._table.elements)
        self._schedule = resolve_schedule(config, total_steps, None)
        self._updates = max(self._adam_steps(), default=0)

    def _context(self) -> Context:
        self._publisher = Publisher(self.config.report_dir, say)
        world = dist.get_world_size() if dist.is_initialized() else 1
        tensor = max((tensor_parallel(p) for _, p in self._named()), default=1)
        on_cpu = self.config.accumulators.device == "cpu"
        return Context(
            reduce=self.reduce,
            device=torch.device("cpu") if on_cpu else self._device,
            rank=this_rank(),
            world={"data": world // tensor, "tensor": tensor, "pipeline": 1, "expert": 1},
            versions=versions(("transformers",)),
            log=say,
            publish=self._publisher,
            announce=self._announce,
            reduce_max=self.shards.reduce_max,
            columns=self.shards.columns,
            layouts=self.shards.layouts,
        )

    def _install(self) -> None:
        names = {id(p): name for name, p in self.shards.params.items()}
        self._ranges: dict[int, list[tuple[int, ShardRange]]] = {}
        for number, (name, item) in enumerate(self.shards.owned):
            self._ranges.setdefault(id(self.shards.params[name]), []).append((number, item))
        self._methods = []
        self._stock: list[Callable[[], object]] = []
        for number, optimizer in enumerate(self.optimizers):
            elementwise = is_elementwise(optimizer)
            tensors = [p for group in optimizer.param_groups for p in group["params"] if id(p) in names]
            plans = {
                id(p): make_plan(item.numel, [item], self.shards.layouts, elementwise=elementwise)
                for p in tensors
                for item in [self.shards.ranges[names[id(p)]]]
            }
            self.scalers.append(
                lr_scaler(optimizer, plans, lambda: self.controller.rates(self.steps), self.config.weight_decay)
            )
            self._hooks.append(optimizer.register_step_post_hook(self._read_moments))
            self._hooks.append(optimizer.register_load_state_dict_post_hook(lambda _: self._loaded.add("optimizer")))
            methods = ReplacedMethods(optimizer)
            self._stock.append(methods.set("step", functools.partial(self._step, number)))
            self._methods.append(methods)
            optimizer.mols = self  # type: ignore[attr-defined]
        again = "call optimizer.mols.detach() and mols_ds.attach(...) again"
        self.new_weights = NewWeights(
            [unwrapped(self.model)], self.scalers, include=again, train="add them to the optimizer", again=again
        )
        self._hooks += self._watch_passes(self.model)

    # ------------------------------------------------------------------ hooks of the protocol

    @property
    def steps(self) -> int:
        """Updates so far; the unit of "mols.start" and "mols.ramp_end"."""
        return self._updates

    def base_lrs(self) -> dict[str, float]:
        return {
            group: float(self.optimizers[number].param_groups[index]["lr"])
            for group, (number, index) in self._lr_group.items()
        }

    def owned_in(self, tensor: Tensor) -> Sequence[tuple[int, ShardRange]]:
        return self._ranges.get(id(tensor), ())

    def adam_settings(self, step: int) -> tuple[int, float, float]:
        """Read the settings from any state, else from the step count."""
        return max(self._adam_steps(), default=max(2, step)), *self.optimizers[0].param_groups[0]["betas"]

    def _adam_steps(self) -> list[int]:
        return [int(state["step"]) for one in self.optimizers for state in one.state.values() if "step" in state]

    # ------------------------------------------------------------------ steps

    @property
    def discarded(self) -> bool:
        """Whether the last step was measured and not taken."""
        return self._discarding

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step(self, number: int, closure: Callable[[], Any] | None = None) -> Any:
        """Replace `optimizer.step` of optimizer `number`: measure, or step with this step's multipliers."""
        if torch._C._current_graph_task_id() != -1:
            raise MolsError(
                "optimizer.step() was called inside of a backward pass, where other gradients are not ready: MoLS "
                "does not support optimizers that step in hooks of backward"
            )
        if not self.optimizers[number].state and by_state_dict():
            return self._stock[number]()  # makes state for a checkpoint, at rate 0
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if number in self._round:  # the others were left out, by a GradScaler or by the loop
            self._close_round()
        if not self._round:
            self._open_round()
        elif self._measures and not self.agree(self._early is not None or not self._changed(number)):
            raise MolsError(CHANGED.format("the gradients of a later optimizer changed after an earlier one stepped"))
        self._round.add(number)
        if not self._discarding:
            self._take_own_step(number)
        if len(self._round) == len(self.optimizers):
            self._close_round()
        return loss

    def _open_round(self) -> None:
        self._passes_before = self.watch.passes
        self._measures = self.controller.measuring and self.config.mode != "moments"
        self._discarding, self._updated = self.controller.discards_steps, False
        if self._measures and self._early is not None and self.loss_scaler is None and by_grad_scaler():
            raise MolsError(SCALED)
        if self._discarding:
            self._probe()
        else:
            self._opened = self._open_step()
            if self._sampling:
                self._sampled = self._measure()

    def _take_own_step(self, number: int) -> None:
        optimizer = self.optimizers[number]
        skips = getattr(optimizer, "found_inf", None)  # of a GradScaler, for a fused optimizer
        skipped = skips is not None and bool(skips.item())
        try:
            self._stock[number]()
        except BaseException:
            self._leave_step()
            raise
        self._updated = self._updated or not skipped

    def _close_round(self) -> None:
        """End the step in which every optimizer was called, or some were left out."""
        self._round.clear()
        if not self._discarding and self._opened is not None:
            self._leave_step()
            self._updates += self._updated
            self._close_step(self._opened, self._updated)
        self._opened = self._early = None
        if self.watch.passes == self._passes_before:  # else the gradients are of the next step already
            self.watch.forget()
        if self._loaded == {"optimizer"} and max(self._adam_steps(), default=self._updates) != self._updates:
            self.resume_stock()
        self._loaded.clear()
        self._follow()

    def _follow(self) -> None:
        """Watch the gradients while they are measured, and from one step before on: an optimizer that is left out ends
        its step in the next one, when the backward pass has run."""
        soon = self.controller.measuring or self.controller.state.due(self.steps + 1)
        if soon and self.config.measures in ("probe", "online"):
            self.watch.start()
        else:
            self.watch.stop()

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's MoLS state, of tensors and strings. No communication; call it between two steps.

        Inside of a calibration each rank has a part of its own (accumulators, not copies). The handle is a `Stateful`
        of torch.distributed.checkpoint.

        Raises:
            MolsError: an optimizer of several has not stepped yet in this step.
        """
        if self._round:
            raise MolsError(
                f"state_dict() in the middle of a step: {len(self._round)} of {len(self.optimizers)} optimizers have "
                "stepped; save after the last one"
            )
        return self.checkpoints.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, bit for bit with the same number of ranks and placements. Collective.

        Load the model, the optimizers and torch's random numbers too. With another number of ranks alphas and ramp
        continue; a partial calibration starts over, with a warning, except in mode "moments".

        Raises:
            MolsCheckpointError: not a state of MoLS, or of other module groups.
        """
        self._round.clear()
        self._opened = self._early = None
        self.watch.stop()
        self.checkpoints.load(state)
        self._loaded.add("mols")
        self._follow()

    def resume_from(self, checkpoint_dir: str) -> None:
        """Make the next `dcp.load` read this rank's accumulators from a folder of torch.distributed.checkpoint, where
        it has them: in a calibration, saved by the same number of ranks."""
        self.checkpoints.template_of(checkpoint_dir)

    def resume_stock(self) -> None:
        """Continue from a checkpoint without MoLS state, whose optimizers are loaded. Collective."""
        self._updates = max(self._adam_steps(), default=0)
        self.resume_without_state(self._updates)
        self._loaded.add("mols")
        self._follow()

    # ------------------------------------------------------------------ gradients

    def read_gradients(self) -> None:
        """Read this step's gradients now: after the backward pass, before they are clipped. Collective.

        Needed where the loop changes gradients between the backward pass and `optimizer.step()`. Does nothing in a step
        that is not measured. A GradScaler that was passed to `attach` may have unscaled them or not.
        """
        if self._round or not self.controller.measuring or self.config.mode == "moments":
            return
        if self._early and self.watch.passes == self._read_after:
            return
        if not self.agree(not self._early):
            raise MolsError("mols.read_gradients() was called again before optimizer.step(): call it once a step")
        self._early = self._read(1.0 if self.loss_scaler is None else self.loss_scaler.scale(self.optimizers))

    def _measure(self) -> bool:
        if self._early is not None:
            if not self.agree(self.watch.passes == self._read_after):
                raise MolsError(
                    "a backward pass ran between mols.read_gradients() and optimizer.step(): call read_gradients() "
                    "after the last one"
                )
            return self._early
        problem = self.watch.problem()
        if not self.agree(not problem):
            raise MolsError(CHANGED.format(problem or "the gradients of another rank changed before optimizer.step()"))
        return self._read()

    def _read(self, scale: float = 1.0) -> bool:
        self.shards.scale = scale
        self.shards.open()
        try:
            usable = super()._measure()
        finally:
            self.shards.close()
        if usable and self.controller.samples == 0 and not self.shards.copies_agree():
            raise MolsError(
                "the ranks have different gradients of the same parameters, so their weights drift apart: wrap the "
                "model in DistributedDataParallel, or average the gradients before optimizer.step()"
            )
        self.watch.record()
        self._read_after = self.watch.passes
        return usable

    def _changed(self, number: int) -> bool:
        return bool(self.watch.problem(p for group in self.optimizers[number].param_groups for p in group["params"]))

    def _after_discard(self, usable: bool) -> None:
        if self.loss_scaler is not None:
            self.loss_scaler.hold()
