"""Interfaces between the step protocol and an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mols_ds.core.layout import ElementLayout
from mols_ds.core.pieces import Parts
from mols_ds.core.schema import Report


class GradientSource(Protocol):
    """Read this rank's reduced gradients at an accumulation boundary.

    "Owned" elements are disjoint over the ranks that reduce statistics; together they are the whole model. No method
    communicates gradient elements.
    """

    def read(self) -> Parts:
        """Yield (offset in the owned elements, 1-D gradient times `loss_scale()`), each owned element once."""
        ...

    def loss_scale(self) -> float:
        """Factor in the gradients of `read`."""
        ...

    def finite(self) -> bool:
        """Whether this rank's gradient is finite."""
        ...

    def reduce(self, values: Tensor) -> Tensor:
        """SUM over the ranks with disjoint owned elements. 1-D float64 in, CPU float64 out."""
        ...

    def reduce_max(self, values: Tensor) -> Tensor:
        """MAX over the same ranks. 1-D uint8 on the CPU in and out."""
        ...

    def discard(self) -> None:
        """Drop the accumulated gradient, as if the engine had not run these batches."""
        ...


def window_of_own_loop(samples: int) -> str:
    """Describe a probe window to a loop whose update count and schedule the engine keeps."""
    return (
        f"the next {samples} steps of the training loop measure gradients and do not update; the update count and "
        f"the schedule do not advance (a loop that counts its own iterations trains {samples} updates fewer)"
    )


def window_of_others_schedule(samples: int, schedule: str = "") -> str:
    """Describe a probe window to a loop that steps its own schedule. `schedule`: what happens to it, if known."""
    schedule = schedule or f"a schedule that the loop steps itself advances by {samples} steps meanwhile"
    return (
        f"the next {samples} steps of the training loop measure gradients and do not update; a loop that counts "
        f"its own iterations trains {samples} updates fewer; {schedule}"
    )


def window_of_extra_batches(samples: int) -> str:
    """Describe a probe window that an integration measures on batches of its own."""
    return (
        f"{samples} extra batches before the next update measure gradients; updates, schedule and the order of the "
        "training data are those of a run without MoLS"
    )


@dataclass
class Context:
    """Facts of the engine for the controller.

    Attributes:
        reduce: SUM over the ranks with disjoint owned elements; float64 CPU tensor in, the sums out.
        device: of the accumulators.
        rank: 0 publishes the report.
        world: sizes for the report: data, tensor, pipeline, expert.
        versions: package versions for the report.
        log: logs one message; called on rank 0 alone.
        publish: shows and writes a new report; called on rank 0 alone. None: no report.
        announce: number of samples -> the effect of a probe window on the training loop, in words.
        reduce_max: MAX over the ranks of `reduce`; uint8 CPU tensor in and out. Default: one rank.
        columns: parameter whose columns are split among ranks -> this rank's number of columns; 0 for rows in an
            unknown order.
        layouts: parameter name -> layout of the owned ranges, where these are no ranges of the logical parameters.
            None: the table's.
    """

    reduce: Callable[[Tensor], Tensor]
    device: torch.device
    rank: int
    world: dict[str, int]
    versions: dict[str, str]
    log: Callable[[str], None] = print
    publish: Callable[[Report], None] | None = None
    announce: Callable[[int], str] = window_of_own_loop
    reduce_max: Callable[[Tensor], Tensor] = lambda values: values
    columns: Mapping[str, int] = field(default_factory=dict)
    layouts: Mapping[str, ElementLayout] | None = None


class OpenStep(NamedTuple):
    """An update that has begun: its number t, the scheduler's rates, whether it ends a "moments" window, whether
    `StepGuard` watches it."""

    t: int
    base_lrs: dict[str, float]
    reads_moments: bool
    guarded: bool
