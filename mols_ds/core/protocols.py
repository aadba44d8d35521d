"""What the step protocol needs from an engine, as small interfaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mols_ds.core.pieces import Parts
from mols_ds.core.schema import Report


class GradientSource(Protocol):
    """The reduced gradient of the elements that this rank owns, at an accumulation boundary.

    "Owned" elements are disjoint over the ranks of the statistics and together the whole model. No method communicates
    gradient elements.
    """

    def read(self) -> Parts:
        """Yield (offset among the owned elements, 1-D gradient), each owned element once, times `loss_scale()`."""
        ...

    def loss_scale(self) -> float:
        """Factor that the gradients of `read` carry."""
        ...

    def finite(self) -> bool:
        """Whether the gradient that this rank reads is finite."""
        ...

    def reduce(self, values: Tensor) -> Tensor:
        """SUM over the ranks whose owned elements are disjoint. 1-D float64 in, CPU float64 out."""
        ...

    def discard(self) -> None:
        """Drop the accumulated gradient, as if the engine had not run these batches."""
        ...


def window_of_own_loop(samples: int) -> str:
    """What mode "probe" means for a loop whose count of updates and schedule the engine keeps."""
    return (
        f"the next {samples} steps of the training loop measure gradients and do not update; the count of updates and "
        f"the schedule stand still (a loop that counts its own iterations trains {samples} updates fewer)"
    )


@dataclass
class Context:
    """What the engine adapter knows and the controller needs.

    Attributes:
        reduce: SUM over exactly the ranks whose owned elements are disjoint; float64 CPU tensor in, the sums out.
        device: where the accumulators live.
        rank: 0 publishes the report.
        world: sizes for the report: data, tensor, pipeline, expert.
        versions: package versions for the report.
        log: prints one message once per job.
        publish: shows and writes a new report; called on rank 0 alone. None: nobody wants it.
        announce: number of samples -> what a window of mode "probe" that begins now means for the training loop.
    """

    reduce: Callable[[Tensor], Tensor]
    device: torch.device
    rank: int
    world: dict[str, int]
    versions: dict[str, str]
    log: Callable[[str], None] = print
    publish: Callable[[Report], None] | None = None
    announce: Callable[[int], str] = window_of_own_loop
