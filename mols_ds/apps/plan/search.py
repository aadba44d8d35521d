"""The nearest setting that fits: fewest changes first, then those that slow the run least."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from mols_ds.apps.plan.job import Change, MegatronJob, ZeroJob

MOST_NODES = 4096
Planned = ZeroJob | MegatronJob


@dataclass(frozen=True)
class Found:
    """labels: the changes; job: with all of them made. nodes: how many it needs."""

    labels: tuple[str, ...]
    job: Planned

    @property
    def nodes(self) -> int:
        return self.job.cluster.nodes


def nearest(job: Planned) -> Found | None:
    """The first of the lattice that fits; else the fewest nodes, doubled and doubled again, on which some setting of it
    does, with that setting; None where none does up to MOST_NODES nodes."""
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
    """The smallest number of nodes between one that does not do and one that does, by halving."""
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
    """Of one number of nodes, the job as it is first."""
    for changes in _lattice(job.axes()):
        made: Planned | None = job
        for change in changes:
            made = change.apply(made)
            if made is None:
                break
        if made is not None and made.fits():
            return Found(tuple(change.label for change in changes), made)
    return None


def _lattice(axes: list[list[Change]]) -> Iterator[tuple[Change, ...]]:
    """All choices of at most one change an axis, by number and then by cost; the axes' order is that of applying."""
    choices = [tuple(c for c in pick if c is not None) for pick in itertools.product(*([None, *axis] for axis in axes))]
    yield from sorted(choices, key=lambda changes: (len(changes), sum(change.cost for change in changes)))
