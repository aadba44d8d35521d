"""A plan as plain values: the JSON of `mols-ds plan --json`, and the source of the text and the plot."""

from __future__ import annotations

from dataclasses import asdict

from mols_ds.apps.plan.job import PlanJob
from mols_ds.apps.plan.search import Found, Planned, nearest
from mols_ds.core.json_types import JsonObject

SCHEMA = 1


def document(job: Planned) -> JsonObject:
    """Compute the plan of a job. Bytes and seconds; every key is always present (docs/planning_model.md)."""
    footprints = job.footprints()
    number = job.heaviest()
    footprint = footprints[number]
    spent = job.times()
    problems = job.problems()
    return {
        "schema": SCHEMA,
        "cluster": job.cluster.model_dump() | {"ranks": job.ranks},
        "run": {"summary": job.summary(), "steps": job.steps, "batch": job.batch, "sequence": job.length},
        "mols": _mols(job, footprint.copies),
        "heaviest": footprint.name,
        "measured_elements": footprint.measured,
        "limits": {"device": job.cluster.limit, "host": job.cluster.host_limit, "nvme": job.cluster.nvme_limit},
        "phases": [
            {
                "phase": phase.name,
                "moment": phase.moment,
                "device": phase.device,
                "device_total": sum(phase.device.values()),
                "host": phase.host,
                "host_total": sum(phase.host.values()),
            }
            for phase in job.phases(footprint)
        ],
        "nvme": footprint.nvme,
        "ranks_of": [
            {"name": each.name, "device_total": max(sum(p.device.values()) for p in job.phases(each))}
            for each in footprints
        ],
        "messages": [message._asdict() | {"sent": message.sent} for message in job.messages_of(number)],
        "calibration": {
            "sums_bytes": job.sums(),
            "tokens_bytes": job.tokens(),
            "agreement_bytes": 8 * job.samples if job.mode == "probe" else 0,
            "accumulator_bytes": job.accumulators(footprint).kept,
        },
        "seconds": {
            **asdict(spent),
            "added": spent.added * job.calibrations(),
            "run": spent.step * job.steps,
        },
        "overhead": spent.overhead(job.steps) * job.calibrations(),
        "fits": not problems,
        "problems": problems,
        "nearest": _nearest(nearest(job)) if problems else None,
    }


def _mols(job: PlanJob, copies: int) -> JsonObject:
    return {
        "enabled": job.mols is not None,
        "mode": job.mode if job.mols is not None else None,
        "samples": job.samples,
        "start": job.start(),
        "calibrations": job.calibrations(),
        "accumulators": job.device,
        "groups": list(job.groups),
        "copies": copies,
    }


def _nearest(found: Found | None) -> JsonObject | None:
    if found is None:
        return None
    number = found.job.heaviest()
    phases = found.job.phases(found.job.footprints()[number])
    return {
        "changes": list(found.labels),
        "nodes": found.nodes,
        "summary": found.job.summary(),
        "device_total": max(sum(phase.device.values()) for phase in phases),
        "host_total": max(sum(phase.host.values()) for phase in phases),
    }
