"""The questions of a study: arm against arm, and shares of the gain that a search finds. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mols_ds.apps.study.curves import final_loss
from mols_ds.apps.study.paired import Difference, Ratio, compare, share
from mols_ds.core.json_types import JsonMapping, JsonObject

if TYPE_CHECKING:
    from mols_ds.apps.study.runs import StudyResults


@dataclass(frozen=True, slots=True)
class PairRow:
    """A comparison from the study's `primary`, `secondary` or `pairs`: `arm` minus `other`, paired by seed.

    question: "primary", "secondary" or empty. adjusted: as in ArmRow, in a study with a primary comparison.
    """

    model: str
    arm: str
    other: str
    difference: Difference | None
    question: str = ""
    adjusted: float | None = None


@dataclass(frozen=True, slots=True)
class ShareRow:
    """How much of the gain of the study's `searched` arm another arm gets on a model.

    share: None unless the searched gain is clear of zero. tuning: runs that chose the arm's settings. passes: measuring
    passes of a run, in runs.
    """

    model: str
    arm: str
    difference: Difference | None
    share: Ratio | None
    tuning: int
    passes: float


def change_of(study: JsonMapping, model: str) -> JsonMapping:
    """Return what the study changes on a model."""
    return (study.get("changes") or {}).get(model) or {}


def seeds_of(study: JsonMapping, model: str) -> list[int]:
    """Return the evaluation seeds of a model."""
    return list(change_of(study, model).get("seeds") or study.get("seeds", ()))


def evaluated(results: StudyResults, model: str, arm: str) -> dict[int, JsonObject]:
    """Return the evaluation runs of an arm at its chosen settings, by seed in the study's order."""
    chosen = results.chosen.get((model, arm))
    if chosen is None:
        return {}
    found = {
        run.seed: result
        for run, result in results.runs.items()
        if (run.model, run.arm, run.values) == (model, arm, chosen.values)
    }
    return {seed: found[seed] for seed in seeds_of(results.study, model) if seed in found}


def losses_of(results: StudyResults, model: str, arm: str) -> dict[int, float]:
    """Return the final losses of an arm at its chosen settings, by evaluation seed."""
    return {seed: final_loss(run) for seed, run in evaluated(results, model, arm).items()}


def pair_row(results: StudyResults, model: str, arm: str, other: str, question: str) -> PairRow:
    """Compare two arms on a model."""
    difference = compare(losses_of(results, model, arm), losses_of(results, model, other))
    return PairRow(model, arm, other, difference, question)


def share_rows(results: StudyResults, model: str, arms: Iterable[str]) -> list[ShareRow]:
    """Return the rows of the arms that are evaluated on a model; none before the searched arm is."""
    searched, base = results.study.get("searched"), losses_of(results, model, results.baseline)
    if not searched or not (best := losses_of(results, model, searched)):
        return []
    rows = []
    for arm in arms:
        runs, losses = evaluated(results, model, arm), losses_of(results, model, arm)
        if arm == results.baseline or not losses:
            continue
        chosen = results.chosen[model, arm]
        tuning = chosen.spent or len(chosen.losses) * len(results.study.get("tune_seeds", ()))
        passes = statistics.fmean((run.get("probe_passes") or 0) / run["steps"] for run in runs.values())
        found = share(losses, best, base)
        rows.append(ShareRow(model, arm, compare(losses, base), found, tuning, passes))
    return rows
