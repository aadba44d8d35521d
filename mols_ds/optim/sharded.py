"""Base class of optimizers whose update reads a statistic of the whole parameter, or of a block of it.

Under ZeRO an optimizer gets flat shards: ranges of many parameters, with padding. `bind` tells it which parameter
elements are where, and how to sum over ranks. Then each `step()` computes the statistics of its ranges, adds those of
shared blocks in one small SUM reduction (never gradient elements; of one length on every rank, fixed by `bind`), and
updates its ranges. Without `bind` each tensor is a whole parameter, as in plain PyTorch and at stage 0.

Elements in no range are padding: never read (DeepSpeed's stage 3 leaves NaN there) and never written.
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
"""Key of a tensor's state -> function that creates its first value."""


def loss_of(closure: Callable[[], float] | None) -> float | None:
    """Call the closure of an optimizer's step, with gradients."""
    with torch.enable_grad():
        return None if closure is None else closure()


class ShardedOptimizer(Optimizer, ABC):
    """See the module docstring. State is float32 and keyed by tensor; `step` counts a tensor's own steps.

    Attributes:
        kinds: number of sums per block.
        moves: DeepSpeed's universal checkpoint carries the whole state (it carries Adam's keys only).
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

    # ------------------------------------------------------------------ for subclasses

    def default_blocks(self, shape: Sequence[int]) -> Blocks:
        """Return the blocks of a parameter by its shape alone."""
        return Blocks.whole(shape)

    def model_blocks(
        self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Sequence[str]]
    ) -> dict[str, Blocks]:
        """Return the blocks per parameter. `shapes`: whole shapes by name; `rules`: the user's module-group rules."""
        return {name: self.default_blocks(shape) for name, shape in shapes.items()}

    @abstractmethod
    def _parts(self, tensor: Tensor, shards: Sequence[ParamShard]) -> StateParts:
        """Return keys of `state[tensor]` other than "step", with functions that create their first values."""

    def _measure(self, group: Group, state: State, tensor: Tensor, shard: ParamShard, out: Tensor) -> None:
        """Update the moments of a shard and write its sums, float64 (kinds, touched blocks), to `out`."""

    @abstractmethod
    def _apply(self, group: Group, state: State, tensor: Tensor, shard: ParamShard, sums: Tensor) -> None:
        """Update the weights of a shard from the sums of its blocks over all ranks. The step must be proportional to
        `group["lr"]`, weight decay included: rates per module need it."""

    def _before_step(self) -> None:
        """Run at the start of every `step()` call."""

    # ------------------------------------------------------------------ binding

    @property
    def bound_to(self) -> list[Tensor]:
        """Tensors of the last `bind`; empty before."""
        return self._tensors if self._bound else []

    def _unbind(self) -> None:
        self._shards: dict[int, list[ParamShard]] = {}
        self._tensors: list[Tensor] = []
        self._numels: list[int] = []
        """Elements of each parameter of the model, by its index."""
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
        """Set the contents of the tensors that will be stepped. Collective if `reduce` is given.

        Args:
            tensors: every tensor that `step()` may get, the same number on every rank.
            ranges: parameter ranges in each tensor; none if it is all padding.
            shapes: whole shape of every optimized parameter of the model, in the same order on every rank.
            blocks: of each parameter; None: `default_blocks`.
            reduce: see `Reduce`; None if this rank's ranges are whole parameters (ZeRO stage 0).

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
            raise MolsUnsupportedError(f"{type(self).__name__}: a rank has two ranges of one parameter")
        if reduce is not None:
            self._reduce = reduce
            self._sums = SharedSums(shards, blocks, shapes, reduce, tensors[0].device)
        for tensor in tensors:
            if self.state.get(tensor):
                self._complete(tensor)

    def bind_model(self, model: nn.Module, rules: Sequence[Sequence[str]] = ()) -> None:
        """Bind the unsharded parameters of `model`, for plain PyTorch."""
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
        """Return the shards of a tensor; an unbound tensor is a whole parameter."""
        shards = self._shards.get(id(tensor))
        if shards is not None:
            return shards
        if self._bound:
            raise MolsUnsupportedError(
                f"{type(self).__name__} got a tensor of {tensor.numel()} elements that it was not bound to: "
                "bind it again (mols_ds.engines.deepspeed.bind_optimizer.bind_optimizer)"
            )
        number, name = len(self._tensors), f"parameter {len(self._tensors)}"
        shape = tuple(tensor.shape)
        self._numels.append(tensor.numel())
        ranges = [ShardRange(name, 0, 0, tensor.numel())] if tensor.numel() else []
        return self._add(tensor, ranges, {name: (shape, self.default_blocks(shape), number)})

    def _find_whole(self) -> None:
        """Without `bind`, treat each tensor as a whole parameter.

        Raises MolsUnsupportedError if they are not the constructor's tensors: an engine made flat shards without
        `bind`, and training would be silently wrong.
        """
        if self._bound:
            return
        if [[tuple(p.shape) for p in group["params"]] for group in self.param_groups] == self._whole:
            for group in self.param_groups:
                for tensor in group["params"]:
                    self._find(tensor)
            return
        raise MolsUnsupportedError(
            f"{type(self).__name__} got other tensors than its constructor and does not know their contents: "
            "use mols_ds.initialize, or call "
            "mols_ds.engines.deepspeed.bind_optimizer.bind_optimizer(engine) after deepspeed.initialize"
        )

    def add_param_group(self, param_group: Settings) -> None:
        check_options(type(self).__name__, {**self.defaults, **param_group})
        super().add_param_group(param_group)
        if any(parameter.is_complex() for parameter in self.param_groups[-1]["params"]):
            raise MolsConfigError(f"{type(self).__name__} does not support complex weights; use another optimizer")
        self._whole.append([tuple(p.shape) for p in self.param_groups[-1]["params"]])  # type: ignore[misc]

    def __getstate__(self) -> State:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.settings}}

    def __setstate__(self, state: State) -> None:
        super().__setstate__(state)
        if "_whole" not in self.__dict__:  # a copy or a pickle of another object: its tensors differ
            self._unbind()
            self._whole = [[p.shape for p in group["params"]] for group in self.param_groups]

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch: overloads
        """Update the tensors in `param_groups` with a gradient; return the closure's loss, if any."""
        loss = loss_of(closure)
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
        """Return the gradient of a shard, 1-D float32."""
        assert tensor.grad is not None
        return shard.of(tensor.grad.reshape(-1)).float()

    def _complete(self, tensor: Tensor) -> None:
        """Create or complete the state of a tensor before its step."""
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
    """average <- beta * average + (1 - beta) * value, in place: Adam's first moment m (1412.6980, algorithm 1)."""
    average.lerp_(value, 1.0 - beta)


def update_square(average: Tensor, value: Tensor, beta: float) -> None:
    """average <- beta * average + (1 - beta) * value^2, in place: Adam's second moment v."""
    average.mul_(beta).addcmul_(value, value, value=1.0 - beta)
