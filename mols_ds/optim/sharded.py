"""Base of optimizers whose update of an element reads a statistic of its whole parameter, or of a block of it.

Under ZeRO an optimizer is handed flat shards: ranges of many parameters one behind the other, with padding. `bind`
tells it which parameter elements lie where and how to sum over the ranks. Then every `step()` call takes the statistics
of its ranges, adds up those of the blocks that several ranks hold in one small SUM reduction (never elements of a
gradient, and always of one length, known since `bind`, on every rank), and updates its ranges. Without `bind` each
tensor is a whole parameter, as in plain PyTorch and at stage 0.

What no range covers is padding: it is never read (DeepSpeed's stage 3 leaves NaN in it) and never written.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from mols_ds.core.ranges import ShardRange
from mols_ds.errors import MolsConfigError, MolsUnsupportedError
from mols_ds.optim.limits import check_options
from mols_ds.optim.param_blocks import Blocks
from mols_ds.optim.param_shards import ParamShard, Reduce, SharedSums
from mols_ds.optim.settings import Settings

Group = Mapping[str, Any]
State = dict[str, Any]
StateParts = dict[str, Callable[[], Tensor | int]]
"""Key of the state of a tensor -> makes its first value."""


class ShardedOptimizer(Optimizer, ABC):
    """See the module's text. State is float32 and keyed by tensor; `step` counts a tensor's own steps.

    Attributes:
        kinds: how many sums a block has.
        moves: whether DeepSpeed's universal checkpoint carries the whole state (it knows Adam's keys only).
        settings: names of attributes that a copy of the object needs.
    """

    kinds = 0
    moves = True
    settings: tuple[str, ...] = ()

    def __init__(self, params: ParamsT, defaults: Settings) -> None:
        check_options(type(self).__name__, defaults)
        self._whole: list[list[torch.Size]] = []
        self._unbind()
        super().__init__(params, defaults)

    # ------------------------------------------------------------------ what a subclass says

    def default_blocks(self, shape: Sequence[int]) -> Blocks:
        """The blocks of a parameter of which nothing but the shape is known."""
        return Blocks.whole(shape)

    def model_blocks(
        self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Sequence[str]]
    ) -> dict[str, Blocks]:
        """The blocks of each parameter in `shapes` (whole shapes by name); `rules`: the user's module-group rules."""
        return {name: self.default_blocks(shape) for name, shape in shapes.items()}

    @abstractmethod
    def _parts(self, tensor: Tensor, shards: Sequence[ParamShard]) -> StateParts:
        """What `state[tensor]` holds beside "step", and how each part begins."""

    def _measure(self, group: Group, state: State, tensor: Tensor, shard: ParamShard, out: Tensor) -> None:
        """Update the moments of a shard and write its sums, float64 (kinds, touched blocks), to `out`."""

    @abstractmethod
    def _apply(self, group: Group, state: State, tensor: Tensor, shard: ParamShard, sums: Tensor) -> None:
        """Update the weights of a shard, given the sums of its blocks over all ranks. The step must be proportional to
        `group["lr"]`, weight decay included: rates per module rely on it."""

    def _before_step(self) -> None:
        """At the start of every `step()` call, before anything else."""

    # ------------------------------------------------------------------ binding

    @property
    def bound_to(self) -> list[Tensor]:
        """The tensors of the last `bind`; empty before."""
        return self._tensors if self._bound else []

    def _unbind(self) -> None:
        self._shards: dict[int, list[ParamShard]] = {}
        self._tensors: list[Tensor] = []
        self._numels: list[int] = []
        """Elements of each parameter of the model, by its number."""
        self._sums: SharedSums | None = None
        self._reduce: Reduce | None = None
        self._bound = False
        self._slots = 0

    def bind(
        self,
        tensors: Sequence[Tensor],
        ranges: Sequence[Sequence[ShardRange]],
        shapes: Mapping[str, tuple[int, ...]],
        blocks: Mapping[str, Blocks] | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        """Tell what lies in the tensors that will be stepped. Collective where `reduce` is given.

        Args:
            tensors: every tensor that `step()` may be handed, the same number on every rank.
            ranges: in each tensor; none where it is padding alone.
            shapes: whole shape of every parameter of the model that is optimized, in the same order on every rank.
            blocks: of each parameter, by default those of `default_blocks`.
            reduce: see `Reduce`; None where the ranges of this rank are whole parameters (ZeRO stage 0).

        Raises:
            MolsUnsupportedError: the ranges of all ranks do not cover each element of each parameter once.
        """
        self._unbind()
        self._bound = True
        if blocks is None:
            blocks = {name: self.default_blocks(shape) for name, shape in shapes.items()}
        self._numels = [math.prod(shape) for shape in shapes.values()]
        numbers = {name: number for number, name in enumerate(shapes)}
        for tensor, its in zip(tensors, ranges, strict=True):
            self._add(tensor, its, {r.name: (shapes[r.name], blocks[r.name], numbers[r.name]) for r in its})
        shards = [shard for its in self._shards.values() for shard in its]
        if len({shard.range.name for shard in shards}) < len(shards):
            raise MolsUnsupportedError(f"{type(self).__name__}: a rank holds two pieces of one parameter")
        if reduce is not None:
            self._reduce = reduce
            self._sums = SharedSums(shards, blocks, shapes, reduce, tensors[0].device)
        for tensor in tensors:
            if self.state.get(tensor):
                self._complete(tensor)

    def bind_model(self, model: nn.Module, rules: Sequence[Sequence[str]] = ()) -> None:
        """Bind the parameters of `model` as they are, unsharded: for plain PyTorch."""
        mine = {id(p) for group in self.param_groups for p in group["params"]}
        named = {name: p for name, p in model.named_parameters() if id(p) in mine}
        shapes = {name: tuple(p.shape) for name, p in named.items()}
        ranges = [[ShardRange(name, 0, 0, p.numel())] if p.numel() else [] for name, p in named.items()]
        self.bind(list(named.values()), ranges, shapes, self.model_blocks(model, shapes, rules))

    def _add(
        self, tensor: Tensor, ranges: Sequence[ShardRange], known: Mapping[str, tuple[tuple[int, ...], Blocks, int]]
    ) -> list[ParamShard]:
        shards: list[ParamShard] = []
        at = 0
        for item in ranges:
            shape, blocks, number = known[item.name]
            shards.append(ParamShard(item, shape, blocks, number, len(shards), at, self._slots, tensor.device))
            at += shards[-1].touched[1]
            self._slots += shards[-1].touched[1]
        self._shards[id(tensor)] = shards
        self._tensors.append(tensor)
        return shards

    def _find(self, tensor: Tensor) -> list[ParamShard]:
        """The shards in a tensor; unbound, it is a whole parameter."""
        shards = self._shards.get(id(tensor))
        if shards is not None:
            return shards
        if self._bound:
            raise MolsUnsupportedError(
                f"{type(self).__name__} is handed a tensor of {tensor.numel()} elements that it was not bound to: "
                "bind it again (mols_ds.engines.deepspeed.bind_optimizer.bind_optimizer)"
            )
        number, name = len(self._tensors), f"parameter {len(self._tensors)}"
        shape = tuple(tensor.shape)
        self._numels.append(tensor.numel())
        ranges = [ShardRange(name, 0, 0, tensor.numel())] if tensor.numel() else []
        return self._add(tensor, ranges, {name: (shape, self.default_blocks(shape), number)})

    def _find_whole(self) -> None:
        """Without `bind`: take each tensor for a whole parameter.

        Raises MolsUnsupportedError where they are other tensors than the constructor's: an engine that cut the
        parameters into flat shards, and nobody told us, would train silently wrong.
        """
        if self._bound:
            return
        if [[tuple(p.shape) for p in group["params"]] for group in self.param_groups] == self._whole:
            for group in self.param_groups:
                for tensor in group["params"]:
                    self._find(tensor)
            return
        raise MolsUnsupportedError(
            f"{type(self).__name__} is handed other tensors than the parameters it was made with, and was not told "
            "what lies in them: use mols_ds.initialize, or call "
            "mols_ds.engines.deepspeed.bind_optimizer.bind_optimizer(engine) after deepspeed.initialize"
        )

    def add_param_group(self, param_group: Settings) -> None:
        check_options(type(self).__name__, {**self.defaults, **param_group})
        super().add_param_group(param_group)
        if any(parameter.is_complex() for parameter in self.param_groups[-1]["params"]):
            raise MolsConfigError(f"{type(self).__name__} has no rule for complex weights; leave them to another one")
        self._whole.append([tuple(p.shape) for p in self.param_groups[-1]["params"]])  # type: ignore[misc]

    def __getstate__(self) -> State:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.settings}}

    def __setstate__(self, state: State) -> None:
        super().__setstate__(state)
        if "_whole" not in self.__dict__:  # a copy or a pickle of another object: its tensors are others
            self._unbind()
            self._whole = [[p.shape for p in group["params"]] for group in self.param_groups]

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch: overloads
        """One update of the tensors in `param_groups` that have a gradient; a closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._find_whole()
        self._before_step()
        todo = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, tensor in todo:
            self._complete(tensor)
            self.state[tensor]["step"] += 1
        if self.kinds:
            device = self._tensors[0].device if self._tensors else torch.device("cpu")
            sums = torch.zeros(self.kinds, self._slots, dtype=torch.float64, device=device)
        for group, tensor in todo if self.kinds else []:
            for shard in self._find(tensor):
                self._measure(group, self.state[tensor], tensor, shard, self._part(sums, shard))
        if self.kinds and self._sums is not None:
            self._sums(sums)
        for group, tensor in todo:
            for shard in self._find(tensor):
                part = self._part(sums, shard) if self.kinds else tensor.new_empty(0)
                self._apply(group, self.state[tensor], tensor, shard, part)
        return loss

    @staticmethod
    def _part(sums: Tensor, shard: ParamShard) -> Tensor:
        return sums[:, shard.slot : shard.slot + shard.touched[1]]

    @staticmethod
    def _gradient(tensor: Tensor, shard: ParamShard) -> Tensor:
        """The gradient of a shard, 1-D float32."""
        assert tensor.grad is not None
        return shard.of(tensor.grad.reshape(-1)).float()

    def _complete(self, tensor: Tensor) -> None:
        """Make or complete the state of a tensor that is about to be stepped."""
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise MolsUnsupportedError(
                f"{type(self).__name__} steps contiguous float32 weights, not {tensor.dtype}: train in mixed precision "
                "with fp32 master weights (DeepSpeed's bf16 or fp16), or use AdamW"
            )
        state = self.state[tensor]
        state["step"] = int(state.get("step", 0))
        for key, first in self._parts(tensor, self._find(tensor)).items():
            if key not in state:
                state[key] = first()


def update_moment(average: Tensor, value: Tensor, beta: float) -> None:
    """average <- beta * average + (1 - beta) * value, in place; the first moment m of Adam (1412.6980, algorithm 1)."""
    average.lerp_(value, 1.0 - beta)


def update_square(average: Tensor, value: Tensor, beta: float) -> None:
    """average <- beta * average + (1 - beta) * value^2, in place; the second moment v of Adam."""
    average.mul_(beta).addcmul_(value, value, value=1.0 - beta)
