"""A user's loop over an engine with one of the tiny language models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tests.engines.deepspeed.engines import MICROS
from tests.helpers.oracle.models import batch, loss_of


def iterate(
    engine: Any, iteration: int, micros: int = MICROS, spoil: Callable[[Tensor], Tensor] | None = None
) -> float:
    """One pass over a global batch: `micros` micro-batches, `engine.step()` after each.

    `spoil` changes this rank's losses. Returns the last loss.
    """
    for micro in range(micros):
        loss = loss_of(engine, batch(iteration, micro, dist.get_rank()))
        engine.backward(loss if spoil is None else spoil(loss))
        engine.step()
    return float(loss.detach())
