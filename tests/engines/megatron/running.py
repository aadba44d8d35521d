"""A training run with MoLS as a test drives it: built, trained, saved and loaded."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from tests.engines.megatron import building, checkpoints
from tests.engines.megatron.building import Setup, Stepped
from tests.engines.megatron.state import fingerprint
from tests.helpers.digests import caught

SECTION: dict[str, Any] = {
    "start": 2,
    "samples": 4,
    "ramp_end": 8,
    "estimator": "mean",
    "noise_floor_correction": False,
    "alpha_min": None,
    "alpha_max": None,
}
"""In mode "probe" 2 updates, 4 samples, 6 updates of ramp; in the other modes the samples are updates."""


class Run:
    """Model, optimizer, scheduler and MoLS. `way`: "attach", "apply", or "stock" (without MoLS); a context manager.

    `settings` go to `building.optimizer`.
    """

    def __init__(
        self, setup: Setup, section: dict[str, Any] | None = None, way: str = "attach", **settings: Any
    ) -> None:
        import megatron_patches

        self.setup, self.way, self.mols = setup, way, None
        per_step = building.samples_per_step(setup)
        building.start(setup)
        if way == "apply":
            megatron_patches.apply(section or SECTION, samples_per_step=per_step)
        try:
            self.built = building.build(setup)
            self.optimizer, self.scheduler = building.optimizer(self.built, **settings)
            if way == "apply":
                self.mols = megatron_patches.current()
            elif way == "attach":
                self.mols = building.attach(self.built, self.optimizer, self.scheduler, section or SECTION)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take the patches of `apply` off."""
        import megatron_patches

        if self.way == "apply":
            megatron_patches.undo()
            self.way = "applied"

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        # Megatron's DDP is never collected, and its config would keep this optimizer alive (building.optimizer).
        self.built.config.grad_scale_func = None

    def iterate(self, iteration: int) -> Stepped:
        return building.step(self.built, self.optimizer, self.scheduler, iteration)

    def train(self, first: int, last: int) -> None:
        """Iterations `first` to `last` - 1."""
        for iteration in range(first, last):
            self.iterate(iteration)

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.built, self.optimizer, self.scheduler, self.mols)

    def save(self, folder: str, kind: str) -> None:
        checkpoints.save(self.built, self.optimizer, self.scheduler, folder, kind)

    def load(self, folder: str, kind: str, *, ask: bool = True) -> list[str]:
        """Load; returns the texts of the MolsWarnings. `ask` for the accumulators where `apply` does not do so."""
        with caught() as warned:
            if ask and self.way == "attach":
                self.mols.resume_from(folder)
            checkpoints.load(self.built, self.optimizer, self.scheduler, folder, kind)
        return warned
