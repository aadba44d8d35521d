"""Numbers of a study's report: one row per arm and model, alphas by model, costs. Pure functions.

Every arm is evaluated at its tuned settings, at the end of its budget, over the evaluation seeds. Differences are
paired by seed (same initial weights and batches). Diverged runs have an infinite loss and are never left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from mols_ds.apps.study import curves
from mols_ds.apps.study.curves import Band, Curve, Sensitivity, SnrCurve, final_loss
from mols_ds.apps.study.paired import Difference, compare, holm
from mols_ds.apps.study.questions import PairRow, ShareRow, change_of, evaluated, pair_row, seeds_of, share_rows
from mols_ds.apps.study.relative import RelativeCost, Runs, relative_cost
from mols_ds.apps.study.runs import setting_text
from mols_ds.core.json_types import JsonMapping, JsonObject
from mols_ds.report.files import finite

if TYPE_CHECKING:
    from mols_ds.apps.study.runs import Chosen, StudyResults

SCHEMA = 1
ENOUGH_SEEDS = 5
"""With fewer evaluation seeds a t-interval is unreliable."""
GROUP_ORDER = ("embedding", "head", "qk", "vo", "mlp", "other")


@dataclass(frozen=True, slots=True)
class ArmRow:
    """One arm on one model. Losses in nats per token; `losses` by evaluation seed, infinite if the run diverged.

    mean, sd, perplexity (exp of the mean, smallest and largest seed): None without evaluation runs; infinite with a
    diverged seed (sd: None). planned: evaluation seeds of the study. tried: tuning candidates. adjusted: Holm's p-value
    over all comparisons of the study but its primary and secondary one. reached: tokens at which the mean curve reaches
    the baseline's final loss. speed_up: the baseline's tokens divided by these; speed_up_charged: the same with the
    tokens of MoLS's measuring passes added to the arm's.
    """

    model: str
    arm: str
    baseline: bool
    values: JsonObject
    tried: int
    edge: bool
    planned: int
    losses: dict[int, float]
    mean: float | None
    sd: float | None
    perplexity: Band | None
    difference: Difference | None
    adjusted: float | None
    reached: float | None
    speed_up: float | None
    speed_up_charged: float | None
    cost: RelativeCost
    weights: int | None
    tokens: int | None
    curve: Curve
    notes: tuple[str, ...] = ()

    @property
    def diverged(self) -> int:
        """Number of evaluation runs that diverged."""
        return sum(math.isinf(loss) for loss in self.losses.values())


@dataclass(frozen=True, slots=True)
class AlphaRow:
    """Alphas of one arm on one model: geometric mean and range over seeds (and layers), by kind of group.

    clamped: kinds with an alpha at a bound in at least one run.
    """

    model: str
    arm: str
    weights: int | None
    seeds: int
    alphas: dict[str, Band]
    clamped: tuple[str, ...]


@dataclass(slots=True)
class Summary:
    """All numbers of a report. `models`, `arms`: in the study's order, the baseline first."""

    name: str
    baseline: str
    models: list[str]
    arms: list[str]
    seeds: list[int]
    tune_seeds: list[int]
    rows: list[ArmRow]
    absent: list[tuple[str, str]]
    comparisons: int
    sensitivity: dict[str, dict[str, Sensitivity]]
    snr: dict[str, dict[str, dict[str, SnrCurve]]]
    alphas: list[AlphaRow]
    missing: list[JsonObject]
    tuning: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    pairs: list[PairRow] = field(default_factory=list)
    shares: list[ShareRow] = field(default_factory=list)

    def of(self, model: str) -> list[ArmRow]:
        """Return the rows of one model."""
        return [row for row in self.rows if row.model == model]


def summarise(results: StudyResults) -> Summary:
    """Compute the report. `absent`: arms whose tuning is not finished; `missing`: runs that can start now."""
    study = results.study
    models = list(dict.fromkeys([*study.get("models", ()), *(model for model, _ in results.chosen)]))
    arms = list(dict.fromkeys([results.baseline, *study.get("arms", ()), *(arm for _, arm in results.chosen)]))
    found = [_row(results, model, arm) for model in models for arm in arms]
    asked = [(study[name], name) for name in ("primary", "secondary") if study.get(name)]
    asked += [(pair, "") for pair in study.get("pairs", ())]
    compared = [pair_row(results, model, pair[0], pair[1], question) for pair, question in asked for model in models]
    rows, pairs, comparisons = _adjust([row for row in found if row is not None], compared, study)
    snr = {model: _snr(results, model, arms) for model in models}
    tuned = [model for model in models if not change_of(study, model).get("settings_of")]
    return Summary(
        name=str(study.get("name", "study")),
        baseline=results.baseline,
        models=models,
        arms=arms,
        seeds=list(study.get("seeds", ())),
        tune_seeds=list(study.get("tune_seeds", ())),
        rows=rows,
        absent=[(m, a) for m in models for a in arms if (m, a) not in results.chosen and _planned(study, m, a)],
        comparisons=comparisons,
        sensitivity={model: _sensitivities(results, model, arms) for model in tuned},
        snr={model: found for model, found in snr.items() if found},
        alphas=[row for arm in arms for model in models if (row := _alphas(results, model, arm)) is not None],
        missing=[
            {"model": run.model, "arm": run.arm, "values": dict(run.values), "seed": run.seed}
            for run in results.missing
        ],
        tuning={model: _tuning(results, model, arms) for model in tuned},
        pairs=pairs,
        shares=[row for model in models for row in share_rows(results, model, arms)],
    )


def group_order(groups: Iterable[str]) -> list[str]:
    """Sort module groups in the paper's order, unknown ones last."""
    known = {name: i for i, name in enumerate(GROUP_ORDER)}
    return sorted(set(groups), key=lambda group: (known.get(group, len(known)), group))


def to_json(summary: Summary) -> JsonObject:
    """Return `summary` as a dict for summary.json. Non-finite numbers become null (`diverged` counts them)."""
    content = asdict(summary)
    for record, row in zip(content["rows"], summary.rows, strict=True):
        record["diverged"] = row.diverged
    clean: JsonObject = finite({"schema": SCHEMA, **content})
    return clean


def _planned(study: JsonMapping, model: str, arm: str) -> bool:
    only = (study.get("arms", {}).get(arm) or {}).get("models")
    return (only is None or model in only) and not change_of(study, model).get("best")


def _row(results: StudyResults, model: str, arm: str) -> ArmRow | None:
    """Return the row of an arm; None if its tuning is not finished."""
    chosen = results.chosen.get((model, arm))
    if chosen is None:
        return None
    runs, baseline = evaluated(results, model, arm), evaluated(results, model, results.baseline)
    losses = {seed: final_loss(run) for seed, run in runs.items()}
    base_losses = {seed: final_loss(run) for seed, run in baseline.items()}
    values = list(losses.values())
    planned = len(seeds_of(results.study, model))
    reached, speed_up, charged = _speed_up(runs, baseline)
    first: JsonMapping = next(iter(runs.values()), {})
    return ArmRow(
        model=model,
        arm=arm,
        baseline=arm == results.baseline,
        values=dict(chosen.values),
        tried=len(chosen.losses),
        edge=chosen.edge,
        planned=planned,
        losses=losses,
        mean=math.fsum(values) / len(values) if values else None,
        sd=statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None,
        perplexity=_perplexity(values),
        difference=None if arm == results.baseline else compare(losses, base_losses),
        adjusted=None,
        reached=reached,
        speed_up=speed_up,
        speed_up_charged=charged,
        cost=relative_cost(results.costs.get(model, {}).get(arm), runs, baseline),
        weights=first.get("weights"),
        tokens=first.get("tokens"),
        curve=curves.validation_curve(runs.values()),
        notes=_notes(chosen, runs, losses, planned, base_losses),
    )


def _perplexity(losses: list[float]) -> Band | None:
    """Compute exp of the mean loss, and of the smallest and largest seed's."""
    if not losses:
        return None
    return Band(*(math.exp(value) if value < 700 else math.inf for value in curves.band(losses)))


def _speed_up(runs: Runs, baseline: Runs) -> tuple[float | None, float | None, float | None]:
    """Return tokens to the baseline's final loss, the speed-up, and the speed-up with measuring passes charged.

    Over common seeds. The target is the end of the baseline's own mean curve, from the same evaluation as the points
    that it is compared with. None if it is not reached or a run diverged.
    """
    seeds = [seed for seed in runs if seed in baseline]
    mine, theirs = [runs[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    if not seeds or not all(math.isfinite(final_loss(run)) for run in [*mine, *theirs]):
        return None, None, None
    target = curves.validation_curve(theirs)
    reached = curves.tokens_to_reach(curves.validation_curve(mine), target.final)
    if reached is None:
        return None, None, None
    budget = target.tokens[-1]
    extra = statistics.fmean((run.get("probe_passes") or 0) * (run.get("tokens_per_step") or 0) for run in mine)
    return reached, budget / reached, budget / (reached + extra)


def _notes(
    chosen: Chosen, runs: Runs, losses: Mapping[int, float], planned: int, base_losses: Mapping[int, float]
) -> tuple[str, ...]:
    """Return the notes of a row: divergence, missing seeds, failed calibrations, measuring passes, edge of the grid."""
    notes = []
    if math.isinf(chosen.losses.get(chosen.values, 0.0)):
        notes.append("diverged with every setting tried")
    elif len(losses) < planned:
        notes.append(f"{len(losses)} of {planned} seeds were run")
    diverged = [seed for seed, loss in losses.items() if math.isinf(loss)]
    if diverged:
        notes.append(f"diverged with {len(diverged)} of {len(losses)} seeds ({', '.join(map(str, diverged))})")
    if losses and base_losses and (unpaired := [seed for seed in losses if seed not in base_losses]):
        notes.append(f"no baseline for seeds {', '.join(map(str, unpaired))}")
    failed = sum(1 for run in runs.values() if (run.get("report") or {}).get("failed"))
    if failed:
        notes.append(f"calibration failed in {failed} of {len(runs)} runs")
    passes = max((run.get("probe_passes") or 0 for run in runs.values()), default=0)
    if passes:
        steps = next((run["steps"] for run in runs.values() if run.get("steps")), None)
        notes.append(f"{passes} measuring passes" + (f" besides {steps:,} steps" if steps else ""))
    if chosen.edge:
        notes.append("best rate at the edge of those tried")
    return tuple(notes)


def _adjust(rows: list[ArmRow], pairs: list[PairRow], study: JsonMapping) -> tuple[list[ArmRow], list[PairRow], int]:
    """Fill in Holm's p-values: over all comparisons with the baseline, or, in a study with a primary comparison, over
    all of these and of `pairs` but the primary and the secondary one. Return the rows and the number of comparisons."""
    asked = {tuple(study.get(name) or ()) for name in ("primary", "secondary")}
    with_pairs = study.get("primary") is not None
    values: dict[tuple[str, int], float] = {}
    for i, row in enumerate(rows):
        if row.difference and row.difference.p is not None and (row.arm, study.get("baseline")) not in asked:
            values["row", i] = row.difference.p
    for i, pair in enumerate(pairs):
        if with_pairs and not pair.question and pair.difference and pair.difference.p is not None:
            values["pair", i] = pair.difference.p
    adjusted = dict(zip(values, holm(list(values.values())), strict=True))
    rows = [replace(row, adjusted=adjusted.get(("row", i))) for i, row in enumerate(rows)]
    pairs = [replace(pair, adjusted=adjusted.get(("pair", i))) for i, pair in enumerate(pairs)]
    return rows, pairs, len(values)


def _sensitivities(results: StudyResults, model: str, arms: Iterable[str]) -> dict[str, Sensitivity]:
    chosen = {arm: results.chosen[model, arm] for arm in arms if (model, arm) in results.chosen}
    found = {arm: curves.sensitivity(best.losses, dict(best.values)) for arm, best in chosen.items()}
    return {arm: curve for arm, curve in found.items() if curve is not None}


def _tuning(results: StudyResults, model: str, arms: Iterable[str]) -> dict[str, dict[str, float]]:
    """Return arm -> candidate -> mean final loss over the tuning seeds."""
    chosen = {arm: results.chosen[model, arm] for arm in arms if (model, arm) in results.chosen}
    return {
        arm: {setting_text(dict(values)): loss for values, loss in sorted(best.losses.items())}
        for arm, best in chosen.items()
    }


def _snr(results: StudyResults, model: str, arms: Iterable[str]) -> dict[str, dict[str, SnrCurve]]:
    """Return arm -> estimator -> curve, for arms with SNR readings."""
    found = {arm: curves.snr_curves(list(evaluated(results, model, arm).values())) for arm in arms}
    return {arm: curve for arm, curve in found.items() if curve}


def _alphas(results: StudyResults, model: str, arm: str) -> AlphaRow | None:
    """Return the alphas of an arm; None without multipliers."""
    runs = evaluated(results, model, arm)
    values: dict[str, list[float]] = {}
    clamped: set[str] = set()
    seeds = 0
    for run in runs.values():
        seeds += bool(run.get("alphas"))
        for group, alpha in (run.get("alphas") or {}).items():
            if alpha is not None and alpha > 0 and math.isfinite(alpha):
                values.setdefault(curves.kind_of(group), []).append(float(alpha))
        groups = (run.get("report") or {}).get("groups") or {}
        clamped |= {curves.kind_of(group) for group, row in groups.items() if row.get("clamped")}
    if not values:
        return None
    alphas = {group: curves.geometric(values[group]) for group in group_order(values)}
    weights = next(iter(runs.values())).get("weights")
    return AlphaRow(model, arm, weights, seeds, alphas, tuple(sorted(clamped)))
