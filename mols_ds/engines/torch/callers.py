"""Find who calls `optimizer.step()`, where the arguments do not show it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

from torch.amp import GradScaler

STATE_MAKERS = {
    ("torch.distributed.checkpoint.state_dict", "_init_optim_state"),
    ("torchtitan.components.optimizer.utils", "init_optim_state"),
}
"""Functions (module, name) that step an optimizer at rate 0, so that it has state to save or to load into."""


def by_grad_scaler() -> bool:
    """Whether a GradScaler steps the optimizer."""
    return _any_caller(lambda frame: isinstance(frame.f_locals.get("self"), GradScaler))


def by_state_dict() -> bool:
    """Whether one of STATE_MAKERS steps the optimizer."""
    return _any_caller(lambda frame: (frame.f_globals.get("__name__"), frame.f_code.co_name) in STATE_MAKERS)


def _any_caller(test: Callable[[FrameType], bool]) -> bool:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if test(frame):
            return True
        frame = frame.f_back
    return False
