"""A life: how the run is set up, and what happens to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Section = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What a life is built with; all of it legal.

    clip: 0 = none. split: two parameter groups, matrices and vectors, instead of one. scheduled: a LambdaLR steps too.
    section: the "mols" section at the start; None: attached later. grid: of Megatron: tp, pp, distributed.
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
    """One global batch, forward and backward, and the engine's step.

    unused: layers whose MLP the batch leaves out. on: data-parallel ranks that do; None: all. bad: one with a NaN loss.
    """

    unused: tuple[int, ...] = ()
    on: tuple[int, ...] | None = None
    bad: int | None = None


@dataclass(frozen=True)
class Evaluate:
    """A forward pass in eval mode."""


@dataclass(frozen=True)
class Freeze:
    """Take a parameter out of training, or with `frozen=False` take it in again."""

    name: str
    frozen: bool = True


@dataclass(frozen=True)
class Save:
    """A checkpoint."""

    tag: str


@dataclass(frozen=True)
class Load:
    """Resume from a checkpoint: in a new engine, or in this one. section: the "mols" section of the resumed run;
    None = without MoLS (a new engine), or as it is (this one)."""

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
    """The user multiplies every parameter group's lr."""

    factor: float


@dataclass(frozen=True)
class BreakOptimizer:
    """From here on the optimizer of one rank steps its first parameter group alone."""

    rank: int


Action = Step | Evaluate | Freeze | Save | Load | Detach | Attach | EditRate | BreakOptimizer


@dataclass(frozen=True)
class Life:
    """seed: of weights, batches and dropout."""

    seed: int
    setting: Setting
    actions: tuple[Action, ...]

    def __hash__(self) -> int:
        return hash((self.seed, repr(self.setting), repr(self.actions)))
