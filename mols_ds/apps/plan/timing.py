"""Time of a step and of a calibration, from nominal figures of the machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mols_ds.apps.plan.cluster import Cluster

Mode = Literal["probe", "online", "moments", "fixed"]
UPDATE_BYTES = {"cpu": 20, "accelerator": 40}
"""Memory traffic of one accumulator update, bytes per element with an fp32 gradient. On the CPU a chunk stays in the
cache: read the gradient, read and write mean and squared deviations (benchmarks/accumulator.py). On an accelerator it
does not: difference 12, mean 12, squared deviations 16."""
READ_BYTES = {"probe": 4, "online": 0}
"""Bytes per element to check that the gradient is finite: one more read."""
MOMENTS_BYTES = 8
"""Bytes per element: mode "moments" reads Adam's two moments once."""
SUMS_BYTES = 8
"""Bytes per element at the end of a calibration: mean and squared deviations are read once."""


@dataclass(frozen=True)
class Times:
    """Seconds. step, messages_of_a_step: of one optimizer step; the others: of the whole calibration."""

    step: float
    messages_of_a_step: float
    passes: float
    updates: float
    transfer: float
    reduction: float

    @property
    def added(self) -> float:
        return self.passes + self.updates + self.transfer + self.reduction

    def overhead(self, steps: int) -> float:
        """Return the added seconds divided by those of `steps` steps without MoLS."""
        return self.added / (steps * self.step)


def bandwidth(cluster: Cluster, inside: bool) -> float:
    """Return the GB/s of one accelerator's link."""
    return cluster.intra_node_gbs if inside else cluster.inter_node_gbs


def step_seconds(cluster: Cluster, flops: float, precision: str) -> float:
    """Return the seconds of a step. flops: of one rank; mfu includes communication."""
    peak = {"fp32": cluster.fp32_tflops, "fp8": cluster.fp8_tflops or cluster.bf16_tflops}
    return flops / (peak.get(precision, cluster.bf16_tflops) * 1e12 * cluster.mfu)
