"""A scenario: the settings of a run, and the actions that it performs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Section = dict[str, Any]  # a "mols" section


@dataclass(frozen=True)
class RunSettings:
    """How the run is built. All combinations that are generated are valid.

    Args:
        stage: ZeRO stage; -1 for Megatron-core.
        micros: micro-batches of a step.
        clip: gradient clipping; 0: none.
        split: two parameter groups, matrices and vectors, instead of one.
        scheduled: a learning-rate scheduler steps with the optimizer.
        frozen: parameters that do not train at the start.
        section: the "mols" section at the start. None: MoLS is attached later.
        grid: Megatron-core's process grid: tp, pp, and `distributed` for its distributed optimizer.
    """

    engine: str = "deepspeed"
    stage: int = 0
    offload: bool = False
    precision: str = "fp32"
    ranks: int = 2
    micros: int = 1
    clip: float = 0.0
    optimizer: str = "adamw"
    lr: float = 1e-2
    decay: float = 0.1
    split: bool = True
    scheduled: bool = False
    frozen: tuple[str, ...] = ()
    section: Section | None = None
    grid: Section = field(default_factory=dict)

    @property
    def replicas(self) -> int:
        """Data-parallel ranks."""
        return self.ranks // (self.grid.get("tp", 1) * self.grid.get("pp", 1))


@dataclass(frozen=True)
class Step:
    """One global batch: forward and backward passes, then the engine's step.

    Args:
        unused: layers whose MLP the batch does not use.
        on: data-parallel ranks on which the MLP is not used. None: all ranks.
        bad: data-parallel rank with a NaN loss. None: no rank.
    """

    unused: tuple[int, ...] = ()
    on: tuple[int, ...] | None = None
    bad: int | None = None


@dataclass(frozen=True)
class Evaluate:
    """A forward pass in eval mode."""


@dataclass(frozen=True)
class Freeze:
    """Set `requires_grad` of a parameter to False; to True with `frozen=False`."""

    name: str
    frozen: bool = True


@dataclass(frozen=True)
class Save:
    """Save a checkpoint."""

    tag: str


@dataclass(frozen=True)
class Load:
    """Load a checkpoint.

    Args:
        fresh: into a new engine, else into the running one.
        section: the "mols" section of the new engine. None: without MoLS. Ignored by the running engine.
    """

    tag: str
    fresh: bool
    section: Section | None = None


@dataclass(frozen=True)
class Detach:
    """`engine.mols.detach()`."""


@dataclass(frozen=True)
class Attach:
    """`mols_ds.attach` on an engine without MoLS."""

    section: Section = field(default_factory=dict)


@dataclass(frozen=True)
class EditRate:
    """The user multiplies the lr of every parameter group by a factor."""

    factor: float


@dataclass(frozen=True)
class BreakOptimizer:
    """From now on the optimizer of one rank steps only its first parameter group."""

    rank: int


Action = Step | Evaluate | Freeze | Save | Load | Detach | Attach | EditRate | BreakOptimizer


@dataclass(frozen=True)
class Scenario:
    """seed: for the weights, the batches and dropout."""

    seed: int
    settings: RunSettings
    actions: tuple[Action, ...]

    def __hash__(self) -> int:
        return hash((self.seed, repr(self.settings), repr(self.actions)))
