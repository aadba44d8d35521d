"""Base class of the shards of all ZeRO layouts (shards.py)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from mols_ds.core.pieces import FlatList, Parts, all_finite
from mols_ds.core.ranges import ShardRange, pack, spans_to_accumulators
from mols_ds.engines.deepspeed.compat import Engine, check_optimizer
from mols_ds.engines.deepspeed.parallel.base import Place
from mols_ds.errors import MolsUnsupportedError


class ZeroShards(ABC):
    """The shards of one engine on this rank.

    Attributes:
        tensors: stepped by the inner optimizer; the same objects until the engine is destroyed.
        sizes: number of elements of each (a tensor on NVMe is empty between steps).
        ranges: per tensor, its parameter elements. Other elements are padding and may be garbage.
        owned: (tensor index, range in it) of the elements that this rank measures: all, or its share of replicas; in
            the order of its accumulators.
        accumulated: the ranges of `owned` in the accumulators.
        param_group: parameter name -> index of its group in `inner.param_groups`.
        frozen_in_shards: parameters that are frozen now but have a part in some rank's shards.
    """

    reads_before_clipping = False
    """Whether to read online samples at the start of the step, instead of in the inner optimizer's step hook."""

    def __init__(self, engine: Engine, places: Mapping[nn.Parameter, Place], group: object = None) -> None:
        self.engine = engine
        self.group = group
        self.outer = engine.optimizer
        self.inner = getattr(self.outer, "optimizer", self.outer)
        check_optimizer(self.outer)
        self.places = places
        # DeepSpeed's shards have the parameters that were trainable at its start, the group table those of now.
        self.frozen = {place.range.name for p, place in places.items() if not p.requires_grad}
        self.tensors: list[Tensor] = []
        self.sizes: list[int] = []
        self.ranges: list[list[ShardRange]] = []
        self.param_group: dict[str, int] = {}
        self._collect()
        self.frozen_in_shards = [
            p for p, place in places.items() if place.range.name in self.frozen & set(self.param_group)
        ]
        self.owned = self._owned()
        self.accumulated = pack(item for _, item in self.owned)
        self._spans = {id(self.tensors[i]): spans for i, spans in spans_to_accumulators(self.owned).items()}

    def _name(self, param: nn.Parameter) -> str:
        return self.places[param].range.name

    def _range(self, param: nn.Parameter, low: int, high: int, offset: int) -> ShardRange:
        """Clip elements low to high to the local parameter; they are at `offset` of a tensor."""
        return self.places[param].range.part(low, high).at(offset)

    def _add(self, tensor: Tensor, size: int, ranges: list[ShardRange]) -> None:
        self.tensors.append(tensor)
        self.sizes.append(size)
        self.ranges.append([item for item in ranges if item.numel > 0 and item.name not in self.frozen])

    @abstractmethod
    def _collect(self) -> None:
        """Fill tensors, sizes, ranges and param_group."""

    def _owned(self) -> list[tuple[int, ShardRange]]:
        uncounted = {place.range.name for place in self.places.values() if not place.counted}
        return [(i, item) for i, ranges in enumerate(self.ranges) for item in ranges if item.name not in uncounted]

    def owned_parts(self, tensor: Tensor, gradient: Tensor | Sequence[Tensor] | None) -> Parts:
        """Yield (offset in the owned elements, 1-D gradient) for the owned ranges of one inner tensor.

        gradient: of all its elements, as one tensor or as a list of parts; may be None if this rank owns none of them.
        """
        spans = self._spans.get(id(tensor), [])
        assert gradient is not None or not spans, "an owned inner tensor has no gradient"
        if gradient is None:
            return
        flat = FlatList([gradient] if isinstance(gradient, Tensor) else gradient)
        for span in spans:
            for at, piece in flat.pieces(span.source, span.numel):
                yield span.target + at, piece

    @abstractmethod
    def read(self) -> Parts:
        """Yield (offset in the owned elements, 1-D gradient) at the boundary, still loss-scaled. No collective."""

    def reduce(self, values: Tensor) -> Tensor:
        """SUM over the ranks with disjoint owned elements. 1-D float64 in, CPU float64 out."""
        sums = values.to(get_accelerator().current_device_name())
        dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=self.group)
        return sums.cpu()

    def reduce_max(self, values: Tensor) -> Tensor:
        """MAX over the same ranks. 1-D uint8 on the CPU in and out."""
        largest = values.to(get_accelerator().current_device_name())
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return largest.cpu()

    def finite(self) -> bool:
        """Whether this rank's gradient is finite."""
        with closing(self.read()) as parts:
            return all_finite(gradient for _, gradient in parts)

    @abstractmethod
    def discard(self) -> None:
        """Discard the accumulated gradient, as if the engine had never run these batches."""

    def begin(self) -> None:  # noqa: B027  (most layouts keep nothing)
        """Drop gradients of earlier batches before the first forward pass of a measured batch."""

    def lower_scale(self) -> bool:
        """Lower a dynamic loss scale after a non-finite gradient on any rank, as a skipped step does.

        Returns:
            False for a static scale, and for one at its minimum (where DeepSpeed would end the run).
        """
        outer = self.outer
        scaler: Any = getattr(outer, "loss_scale_config", None) or getattr(outer, "loss_scaler", None)
        dynamic = getattr(scaler, "dynamic_loss_scale", None) or getattr(scaler, "dynamic", False)
        lowest = getattr(scaler, "min_loss_scale", None) or getattr(scaler, "min_scale", None) or 1.0
        if not dynamic or float(scaler.cur_scale) <= lowest:
            return False
        outer._update_scale(True)
        return True

    def loss_scale(self) -> float:
        """Factor in the gradients of `read`."""
        return 1.0

    def undo_factor(self, scale_before: float) -> float:
        """Return f with: inner `.grad` x f = the unscaled, unclipped gradient; NaN if the gradient is not finite.

        scale_before: loss scale at the start of the step. DeepSpeed grows a dynamic scale before it unscales, and then
        divides by the new one.
        """
        norm = getattr(self.outer, "_global_grad_norm", None)
        if norm is None:
            raise MolsUnsupportedError(
                "zero_optimization.compute_grad_norm=false: without the norm, clipping cannot be undone and "
                'non-finite gradients cannot be detected; remove it, or use "mode": "probe"'
            )
        norm = float(norm)
        if not math.isfinite(norm) or norm < 0:
            return math.nan
        return self._undo(norm, scale_before)

    def _undo(self, norm: float, scale_before: float) -> float:
        scale = float(self.outer.loss_scale)
        clip = float(self.outer.clip_grad)
        if clip <= 0:
            return scale / scale_before
        scaled_norm = norm * self._norm_scale(scale_before, scale)
        return scale * max(1.0, (scaled_norm / scale + 1e-6) / clip) / scale_before

    def _norm_scale(self, before: float, after: float) -> float:
        """The scale by which `_global_grad_norm` was divided."""
        return before
