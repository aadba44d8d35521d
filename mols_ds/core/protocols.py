"""What the step protocol needs from an engine, as small interfaces."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mols_ds.core.pieces import Parts


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
