"""Record the SNR of every module group over a run from Adam's moments (mode "moments"; the paper's Figures 1 and 7)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

import torch
from torch.optim import Optimizer

from mols_ds.core import estimators
from mols_ds.core.adam_moments import adam_moments, moment_pieces
from mols_ds.core.config import MolsConfig
from mols_ds.core.group_stats import NoiseFloor
from mols_ds.core.local_stats import LocalStats
from mols_ds.engines.deepspeed.compat import Engine
from mols_ds.engines.deepspeed.parallel.find import find_grid
from mols_ds.engines.deepspeed.shards import find_shards
from mols_ds.errors import MolsUnsupportedError
from mols_ds.optim.step_trial import decay_in_moments


class Reading(TypedDict):
    """One reading: step, and estimator -> group -> value."""

    step: int
    curves: dict[str, dict[str, float]]


class SnrWatch:
    """Read the SNR of each group every `every` updates. Changes nothing in the engine.

    The weights move between the gradients in Adam's moments. What this changes in the gradient counts as noise: a group
    that oscillates at its rate reads too noisy. Rows of tokens that do not occur are included.

    Call it with the engine after each update, on every rank. `steps` and `curves` (estimator -> group -> values,
    without the noise floor of Adam's window) are the same on all ranks. A reading costs one pass over this rank's
    optimizer state and one all-reduce of the group sums.

    Raises:
        MolsUnsupportedError: the optimizer has no exp_avg and exp_avg_sq of the shards' size (checked at the first
            reading, on every rank), or its state is on NVMe.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.steps: list[int] = []
        self.curves: dict[str, dict[str, list[float]]] = {name: {} for name in estimators.ESTIMATORS}

    def __call__(self, engine: Engine) -> None:
        if engine.global_steps % self.every:
            return
        for name, values in self.read(engine).items():
            for group, value in values.items():
                self.curves[name].setdefault(group, []).append(value)
        self.steps.append(int(engine.global_steps))

    def reading(self) -> Reading:
        """The last reading as plain numbers, for `restore`."""
        last = {name: {g: values[-1] for g, values in by.items()} for name, by in self.curves.items()}
        return {"step": self.steps[-1], "curves": last}

    def restore(self, readings: Iterable[Reading], before: int) -> None:
        """Load the readings of a resumed run: those before step `before`, each once. A run that was interrupted twice
        has the same reading twice."""
        for reading in readings:
            if (self.steps[-1] if self.steps else 0) < reading["step"] < before:
                self.steps.append(reading["step"])
                for name, values in reading["curves"].items():
                    for group, value in values.items():
                        self.curves[name].setdefault(group, []).append(value)

    def as_snr(self) -> dict[str, list[float]]:
        """One positive curve per group: the SNR d^2 / (1 - d^2) of the mean damping d."""
        return {g: [d * d / (1.0 - d * d) for d in values] for g, values in self.curves["damping"].items()}

    def read(self, engine: Engine) -> dict[str, dict[str, float]]:
        """Compute estimator -> group -> value from the current moments. Collective."""
        if not hasattr(self, "_grid"):
            self._build(engine)
        inner, elements = self._shards.inner, self._elements
        weight = self._weight(inner)
        elements.open_squares(NoiseFloor(1.0, weight))
        for number, (index, item) in enumerate(self._shards.owned):
            tensor = self._shards.tensors[index]
            state = inner.state.get(tensor, {})
            mean, square = (item.view(state[key].view(-1)) for key in ("exp_avg", "exp_avg_sq"))
            for at, mu2, s2, _ in moment_pieces(mean, square, self._step(inner), *self._betas):
                elements.add_squares(number, mu2, s2, at)
        sums = elements.take_squares()
        sums.load_packed(self._shards.reduce(sums.pack()))
        return {name: estimators.estimate(sums, name, True) for name in estimators.ESTIMATORS}

    def _build(self, engine: Engine) -> None:
        self._engine = engine
        self._grid = find_grid(engine)
        self._shards = find_shards(engine, self._grid)
        inner = self._shards.inner
        fits = all(
            getattr(inner.state.get(tensor, {}).get(key), "numel", lambda: 0)() == size
            for tensor, size in zip(self._shards.tensors, self._shards.sizes, strict=True)
            for key in ("exp_avg", "exp_avg_sq")
        )
        bad = self._shards.reduce(torch.tensor([0.0 if fits else 1.0], dtype=torch.float64, device="cpu"))
        if bad.item():
            raise MolsUnsupportedError(
                f"SNR curves cannot be read: {type(inner).__name__} has no exp_avg and exp_avg_sq in memory here"
            )
        if decay_in_moments(inner):
            raise MolsUnsupportedError(
                f"SNR curves cannot be read: {type(inner).__name__} adds weight decay to the gradient, so its moments "
                "are those of both: use AdamW or weight_decay 0"
            )
        table = self._grid.table(MolsConfig(), self._shards.param_group)
        owned = self._shards.accumulated
        self._elements = LocalStats(owned, table.layouts, list(table.elements), torch.device("cpu"))
        self._betas: tuple[float, float] = tuple(inner.param_groups[0]["betas"])

    def _step(self, inner: Optimizer) -> int:
        """Adam's own count; it differs from the engine's after skipped steps."""
        counts = [int(state["step"]) for state in inner.state.values() if "step" in state]
        counts += [int(group["step"]) for group in inner.param_groups if "step" in group]
        return max(counts, default=int(self._engine.global_steps))

    def _weight(self, inner: Optimizer) -> float:
        zero = torch.zeros(1, device="cpu")
        return adam_moments(zero, zero, self._step(inner), *self._betas)[2]
