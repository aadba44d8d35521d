"""Parts of a plan: bytes by kind at the moments of a step, messages, phases of MoLS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

KINDS = ("weights", "gradients", "optimizer", "accumulators", "activations", "buffers", "workspace", "copies")
"""buffers: buckets, gathered parameters, flattened copies. workspace: an estimate of temporary tensors, such as copies
of the head's output around the loss, and of optimizers that work on whole arrays. copies: of weights that a scaled step
corrects (`mols_ds.apps.plan.scaling`)."""
PHASES = ("waiting", "calibrating", "ramping")
"""Phases of MoLS. "fixed" needs the memory of "ramping"."""
Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send and receive"]
Bytes = dict[str, int]
"""Kind -> bytes."""


@dataclass(frozen=True)
class Footprint:
    """Memory of one rank without the accumulators.

    Attributes:
        resident: bytes that are always on the accelerator.
        moments: name of a moment of the step -> further bytes on the accelerator at that moment.
        host: bytes in host memory, always or at the peak of the step. nvme: bytes on NVMe.
        owned: elements that this rank's optimizer steps, without padding.
        measured: elements whose statistics this rank keeps; its part if several ranks step them.
        copies: further bytes during a scaled step; on the host if the optimizer is there.
    """

    resident: Bytes
    moments: Mapping[str, Bytes]
    owned: int
    measured: int
    host: Bytes = field(default_factory=dict)
    nvme: int = 0
    name: str = "rank 0"
    copies: int = 0

    def peak(self, *, scaled: bool = False) -> tuple[str, Bytes]:
        """Return (moment with the most accelerator memory, kind -> bytes). scaled: the step applies multipliers."""
        moments = dict(self.moments)
        if scaled and self.steps_on_device:
            moments["step"] = add(moments["step"], {"copies": self.copies})
        name = max(moments, key=lambda moment: sum(moments[moment].values()))
        return name, add(self.resident, moments[name])

    @property
    def steps_on_device(self) -> bool:
        """True if the optimizer steps on the accelerator; otherwise its tensors are in host memory."""
        return "step" in self.moments


class Message(NamedTuple):
    """Collectives of one kind that a rank takes part in during one step.

    Attributes:
        over: kind of the ranks: "data", "tensor", "pipeline" or "expert"; size: their number.
        calls: per step; bytes: of all calls together, each one the whole tensor that is reduced or gathered.
        inside: True if all ranks of the group are in one node.
        measuring: bytes in a step that only measures (mode "probe").
    """

    what: str
    operation: Operation
    over: str
    size: int
    calls: int
    bytes: int
    inside: bool
    measuring: int

    @property
    def sent(self) -> int:
        """Bytes that a rank sends with ring algorithms (Patarasuk and Yuan 2009): 2 B (n - 1) / n for an all-reduce of
        B bytes over n ranks, B (n - 1) / n for a gather or scatter."""
        return ring(self.operation, self.bytes, self.size)


def ring(operation: Operation, size: int, ranks: int) -> int:
    """Return the bytes that a rank sends; see `Message.sent`."""
    if operation == "send and receive":
        return size
    share = size * (ranks - 1) // ranks
    return 2 * share if operation == "all-reduce" else share


def add(*parts: Mapping[str, int]) -> Bytes:
    """Sum the bytes by kind, in the order of KINDS."""
    return {kind: total for kind in KINDS if (total := sum(part.get(kind, 0) for part in parts))}


def up(number: int, multiple: int) -> int:
    """Round `number` up to a multiple."""
    return -(-number // multiple) * multiple
