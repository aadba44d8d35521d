"""Detect gradients that changed between the backward pass and the optimizer's step: clipped, or unscaled.

Statistics are of the unclipped gradient. While a calibration measures, hooks on the parameters note the version counter
of every gradient at the end of each backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import Variable

from mols_ds.core.pieces import local_part

Versions = dict[int, tuple[int, int]]
"""id of a parameter -> (address, version counter) of its gradient's local part."""

SCALED = (
    "a GradScaler calls optimizer.step(), and mols.read_gradients() may have read scaled gradients: pass it to "
    "mols_ds.attach(..., grad_scaler=scaler)"
)
CHANGED = (
    "{}, and MoLS measures unclipped gradients: call mols.read_gradients() after the backward pass and before you clip "
    "(with a GradScaler: pass it to mols_ds.attach)"
)


class GradientWatch:
    """Watch the gradients of `params` between `start()` and `stop()`."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._params = list(params)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._task = -1
        self._seen: Versions | None = None
        self.passes = 0
        """Backward passes so far."""

    def start(self) -> None:
        """Watch from the next backward pass on. A second call does nothing."""
        if not self._hooks:
            self._hooks = [p.register_post_accumulate_grad_hook(self._on_gradient) for p in self._params]  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Remove the hooks. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._seen = [], None

    def record(self) -> None:
        """Take the gradients as they are now for those of the backward pass."""
        self._seen = self._versions()

    def problem(self, params: Iterable[Tensor] | None = None) -> str:
        """Describe what happened to gradients since the last `record`; "": nothing. `params`: None: all."""
        if self._seen is None:
            return "no backward pass was seen since the last step"
        among = None if params is None else {id(p) for p in params}
        now = self._versions()
        for key in now.keys() | self._seen.keys():
            if (among is None or key in among) and now.get(key) != self._seen.get(key):
                return "the gradients changed between the backward pass and optimizer.step()"
        return ""

    def forget(self) -> None:
        """Forget what was recorded: a step used it."""
        self._seen = None

    def _end_pass(self) -> None:
        self.passes += 1
        self.record()

    def _versions(self) -> Versions:
        every = ((id(p), local_part(p.grad)) for p in self._params if p.grad is not None)
        return {key: (gradient.data_ptr(), gradient._version) for key, gradient in every}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _on_gradient(self, parameter: Tensor) -> None:
        """Record once at the end of this backward pass, after DDP and FSDP have reduced the gradients.

        Both finish in callbacks at its end, which they add before or during the pass. A callback that is added by a
        callback runs after them.
        """
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        self._task = task
        _at_end(lambda: _at_end(self._end_pass))


def _at_end(call: Callable[[], None]) -> None:
    Variable._execution_engine.queue_callback(call)
