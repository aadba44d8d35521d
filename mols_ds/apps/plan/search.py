"""Search the nearest setting that fits: fewest changes first, then least slow-down."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from mols_ds.apps.plan.job import MegatronJob, ZeroJob

MOST_NODES = 4096
Planned = ZeroJob | MegatronJob


@dataclass(frozen=True)
class Found:
    """A setting that fits. labels: its changes; job: with all changes."""

    labels: tuple[str, ...]
    job: Planned

    @property
    def nodes(self) -> int:
        return self.job.cluster.nodes


def nearest(job: Planned) -> Found | None:
    """Return the first combination of changes that fits. If none fits, double the nodes until one does, then find the
    smallest number of nodes. Return None if nothing fits on MOST_NODES nodes."""
    found = _search(job)
    if found is not None:
        return found
    nodes = job.cluster.nodes
    while nodes * 2 <= MOST_NODES:
        nodes *= 2
        wider = job.with_nodes(nodes)
        found = _search(wider) if wider is not None else None
        if found is not None:
            return _fewest(job, nodes // 2, found)
    return None


def _fewest(job: Planned, low: int, high: Found) -> Found:
    """Bisect the number of nodes between `low`, which does not fit, and `high`, which fits."""
    at = high.nodes
    while at - low > 1:
        middle = (low + at) // 2
        wider = job.with_nodes(middle)
        found = _search(wider) if wider is not None else None
        if found is None:
            low = middle
        else:
            at, high = middle, found
    return Found((f"{high.nodes} nodes", *high.labels), high.job)


def _search(job: Planned) -> Found | None:
    """Return the first combination of changes that fits on this number of nodes, the unchanged job first."""
    # All choices of at most one change per axis, sorted by number and then cost; applied in axis order.
    picks = itertools.product(*([None, *axis] for axis in job.axes()))
    choices = [tuple(change for change in pick if change is not None) for pick in picks]
    for changes in sorted(choices, key=lambda changes: (len(changes), sum(change.cost for change in changes))):
        made: Planned | None = job
        for change in changes:
            made = change.apply(made)
            if made is None:
                break
        if made is not None and not made.problems():
            return Found(tuple(change.label for change in changes), made)
    return None
