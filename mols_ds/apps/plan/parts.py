"""What a plan is made of: bytes by kind at the moments of a step, messages, and the phases of MoLS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

KINDS = ("weights", "gradients", "optimizer", "accumulators", "activations", "buffers", "workspace", "copies")
"""buffers: buckets, gathered parameters, flattened copies. workspace: an estimate of what arithmetic takes for a
moment: copies of the head's output around the loss, and of an optimizer that works on whole arrays. copies: of the
weights that a scaled step corrects (`mols_ds.apps.plan.scaling`)."""
PHASES = ("waiting", "calibrating", "ramping")
"""Phases of MoLS; "fixed" needs what "ramping" needs."""
Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send and receive"]
Bytes = dict[str, int]
"""Kind -> bytes."""


@dataclass(frozen=True)
class Footprint:
    """Memory of one rank without the accumulators.

    Attributes:
        resident: on the accelerator at all times.
        moments: name of a moment of the step -> what is on the accelerator then and not always.
        host: in the host's memory, at all times or at the step's peak. nvme: bytes on NVMe.
        owned: elements that this rank's part of the optimizer steps, without padding.
        measured: elements whose statistics it keeps: of those that several ranks step, its part.
        copies: bytes that a scaled step holds besides; on the host where the optimizer is there.
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
        """(the moment at which the accelerator holds most, kind -> bytes then). scaled: the step has multipliers."""
        moments = dict(self.moments)
        if scaled and self.steps_on_device:
            moments["step"] = add(moments["step"], {"copies": self.copies})
        name = max(moments, key=lambda moment: sum(moments[moment].values()))
        return name, add(self.resident, moments[name])

    @property
    def steps_on_device(self) -> bool:
        """Whether the optimizer's step is on the accelerator; else its tensors are in the host's memory."""
        return "step" in self.moments


class Message(NamedTuple):
    """Collectives of one kind that a rank takes part in during one step.

    Attributes:
        over: which ranks: "data", "tensor", "pipeline" or "expert"; size: how many they are.
        calls: of a step; bytes: of all calls together, each counted as the whole tensor that is reduced or gathered.
        inside: whether the ranks of the group are in one node.
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
        """Bytes that a rank sends with ring algorithms (Patarasuk and Yuan 2009): of an all-reduce of B bytes over n
        ranks 2 B (n - 1) / n, of a gather or a scatter B (n - 1) / n."""
        return ring(self.operation, self.bytes, self.size)


def ring(operation: Operation, size: int, ranks: int) -> int:
    """See `Message.sent`."""
    if operation == "send and receive":
        return size
    share = size * (ranks - 1) // ranks
    return 2 * share if operation == "all-reduce" else share


def add(*parts: Mapping[str, int]) -> Bytes:
    """Kind -> sum; kinds in the order of KINDS."""
    return {kind: total for kind in KINDS if (total := sum(part.get(kind, 0) for part in parts))}


def up(number: int, multiple: int) -> int:
    """`number` rounded up to a multiple."""
    return -(-number // multiple) * multiple
