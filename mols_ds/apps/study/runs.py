"""The runs of a study: their names, the next ones to execute, and their results on disk.

A finished run is one JSON file in OUT/runs, written atomically, or one line of the study's `rows`. A hash of every
setting that affects the result names it. So a stopped study continues where it was, a new arm repeats nothing, and
results of other settings are never mixed in. In `rows`, arms with the same settings share their runs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mols_ds.apps.study.curves import final_loss
from mols_ds.apps.study.rows import Rows
from mols_ds.apps.study.search import PREFIX, search
from mols_ds.apps.study.spec import Study, Value, Values
from mols_ds.core.files import write_whole
from mols_ds.core.json_text import read_json
from mols_ds.core.json_types import JsonMapping, JsonObject
from mols_ds.errors import MolsConfigError

SCHEMA = 1


@dataclass(frozen=True, slots=True, order=True)
class StudyRun:
    """One training run: model, arm, tuned settings and seed."""

    model: str
    arm: str
    values: Values
    seed: int

    @property
    def lr(self) -> float:
        """Base learning rate."""
        return float(dict(self.values)["lr"])

    @property
    def label(self) -> str:
        """Short name for people and files: block-mols-lr0.004-s1."""
        settings = [f"{name.rsplit('.', 1)[-1]}{_short(value)}" for name, value in self.values]
        return "-".join([self.model, self.arm, *settings, f"s{self.seed}"])


class Chosen(NamedTuple):
    """Tuning result of an arm on a model.

    values: the best candidate. losses: every candidate -> mean final validation loss over the tuning seeds (infinite if
    one diverged). edge: the best rate is the smallest or largest one tried. spent: runs of a search; 0: every candidate
    ran with every tuning seed.
    """

    values: Values
    losses: dict[Values, float]
    edge: bool
    spent: int = 0


@dataclass
class StudyResults:
    """Input of a report."""

    study: JsonObject
    baseline: str
    runs: dict[StudyRun, JsonObject]
    chosen: dict[tuple[str, str], Chosen]
    costs: dict[str, dict[str, JsonObject]] = field(default_factory=dict)
    missing: list[StudyRun] = field(default_factory=list)


def _short(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def setting_text(values: JsonMapping) -> str:
    """Format settings: `lr 0.004, params.rank 128`."""
    return ", ".join(f"{name} {_short(value)}" for name, value in values.items())


def arm_config(study: Study, arm: str, values: Values) -> JsonObject:
    """Return the DeepSpeed config of an arm at tuned settings; `mols_ds.training.ds_config.resolve` sets batch sizes.

    Default: fp32 and ZeRO stage 0.
    """
    spec = study.arms[arm]
    config: JsonObject = {"zero_optimization": {"stage": 0}, "gradient_clipping": study.clip}
    config["train_batch_size"] = study.batch.sequences
    if study.batch.micro is not None:
        config["train_micro_batch_size_per_gpu"] = study.batch.micro
    for extra in (study.deepspeed, spec.deepspeed):
        _merge(config, extra)
    if "fp16" not in config:
        config.setdefault("bf16", {"enabled": False})  # fixed, so that it does not depend on this machine
    tuned = dict(values)
    config["optimizer"] = {"type": spec.optimizer, "params": {**spec.params, "lr": tuned.pop("lr")}}
    if spec.source is not None:
        config["optimizer"]["source"] = spec.source
    if spec.mols is not None:
        config["mols"] = json.loads(json.dumps(spec.mols))
    for name, value in tuned.items():
        section, key = name.split(".", 1)
        target = {"params": config["optimizer"]["params"], "mols": config.get("mols"), "deepspeed": config}[section]
        assert target is not None
        *path, last = key.split(".")
        for part in path:
            target = target.setdefault(part, {})
        target[last] = value
    return config


def _merge(into: JsonObject, extra: JsonMapping) -> None:
    for key, value in json.loads(json.dumps(dict(extra))).items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


class Store:
    """Results of a study's runs: in the folder `out`, or in the study's `rows`."""

    def __init__(self, study: Study, out: Path) -> None:
        self.study, self.out = study, out
        self.rows = None if study.rows is None else Rows(Path(study.rows))

    def digest(self, run: StudyRun) -> str:
        """Return the hash of every setting that affects the result of a run; the arm's name does not."""
        study = self.study.at(run.model)
        state = [
            SCHEMA,
            study.models[run.model],
            {**study.data.model_dump(), "source": Path(study.data.source).name},
            study.batch.model_dump(),
            study.steps,
            [study.evaluation.sequences, study.eval_every],
            arm_config(study, run.arm, run.values),
            study.activation_checkpointing,
            run.seed,
        ]
        if study.snr is not None and run.arm in study.snr.arms:
            state.append(study.snr.every)
        return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=6).hexdigest()

    def key(self, run: StudyRun) -> str:
        """Return the label and hash of a run: its file name without suffix."""
        return f"{run.label}-{self.digest(run)}"

    def file(self, run: StudyRun) -> Path:
        """Return the path of a finished run's result."""
        return self.out / "runs" / f"{self.key(run)}.json"

    def folder(self, run: StudyRun) -> Path:
        """Return the folder of a run in progress. It is removed when the result is saved."""
        return self.out / "running" / self.key(run)

    def load(self, run: StudyRun) -> JsonObject | None:
        """Return the result of a run, or None if it is not finished. Raises MolsConfigError for a damaged file."""
        if self.rows is not None:
            return self.rows.read().get(self.digest(run))
        file = self.file(run)
        if not file.is_file():
            return None
        return _read(file, "the run repeats")

    def save(self, run: StudyRun, result: JsonMapping) -> None:
        """Write the result of a finished run atomically."""
        if self.rows is not None:
            self.rows.add(self.digest(run), result)
            return
        file = self.file(run)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(result) + "\n")

    def costs(self) -> dict[str, dict[str, JsonObject]]:
        """Return model -> arm -> result of `costs.measure`, with the key of its run as "run"."""
        file = self.out / "costs.json"
        return _read(file, "the costs are measured again") if file.is_file() else {}

    def save_cost(self, run: StudyRun, cost: JsonMapping) -> None:
        """Add the costs of a run's arm, atomically."""
        costs = self.costs()
        costs.setdefault(run.model, {})[run.arm] = {**cost, "run": self.key(run)}
        write_whole(self.out / "costs.json", json.dumps(costs, indent=1) + "\n")

    def loss(self, run: StudyRun) -> float | None:
        """Return the final validation loss: infinite if the run diverged, None if it is not finished."""
        result = self.load(run)
        return None if result is None else final_loss(result)


def _read(file: Path, then: str) -> JsonObject:
    try:
        content = read_json(file, str(file))
    except MolsConfigError as error:
        raise MolsConfigError(f"{error}; it is damaged: remove it, and {then}") from error
    if not isinstance(content, dict):
        raise MolsConfigError(f"{file} is damaged (no JSON object): remove it, and {then}")
    return content


def tuning(study: Study, store: Store, model: str, arm: str) -> tuple[list[StudyRun], Chosen | None]:
    """Return the tuning runs that an arm still needs on a model; if there are none, what was chosen.

    Candidates are the whole grid. While the best rate is at an edge, the next rate on that side, by a factor of 2, is
    added with the best values of the other settings, at most `study.extend` times. With `settings_of`, the choice on
    that model. With `search`, see `mols_ds.apps.study.search`.
    """
    change, spec = study.changes.get(model), study.arms[arm]
    if change is not None and change.settings_of is not None:
        return [], tuning(study, store, change.settings_of, arm)[1]
    if spec.search is not None:
        return _searching(study, store, model, arm)
    losses: dict[Values, float] = {}
    wanted = study.candidates(arm)
    for _ in range(study.extend + 1):
        missing = []
        for values in wanted:
            found = [(run, store.loss(run)) for run in (StudyRun(model, arm, values, s) for s in study.tune_seeds)]
            missing += [run for run, loss in found if loss is None]
            losses[values] = math.fsum(loss or 0.0 for _, loss in found) / len(found)
        if missing:
            return missing, None
        best = min(losses, key=lambda values: losses[values])
        further = _beyond(best, losses)
        if further is None or not math.isfinite(losses[best]):
            return [], Chosen(best, losses, further is not None)
        wanted = [further]
    return [], Chosen(best, losses, _beyond(best, losses) is not None)


def _searching(study: Study, store: Store, model: str, arm: str) -> tuple[list[StudyRun], Chosen | None]:
    """Return the next run of an arm's search, or what it found. Neither before the arm where it starts is tuned."""
    spec = study.arms[arm].search
    assert spec is not None
    first = tuning(study, store, model, spec.start)[1]
    if first is None:
        return [], None
    section = arm_config(study, spec.start, first.values).get("mols") or {}
    alphas = tuple((PREFIX + group, alpha) for group, alpha in (section.get("fixed_alphas") or {}).items())
    found = search(
        (("lr", dict(first.values)["lr"]), *alphas),
        spec.groups,
        study.tune_seeds,
        spec.runs,
        lambda values, seed: store.loss(StudyRun(model, arm, values, seed)),
    )
    if found.wanted is not None:
        return [StudyRun(model, arm, *found.wanted)], None
    return [], None if found.best is None else Chosen(found.best, found.losses, False, found.spent)


def best_arms(study: Study, store: Store, model: str, number: int) -> list[str] | None:
    """Return the baseline and the `number` arms with the lowest mean loss over a model's evaluation seeds, best first.

    Of arms with the same settings only the first counts. None while a run is missing.
    """
    means: dict[str, float] = {}
    seen: set[str] = set()
    for arm in study.arms_of(model):
        best = tuning(study, store, model, arm)[1]
        if best is None:
            return None
        runs = [StudyRun(model, arm, best.values, seed) for seed in study.at(model).seeds]
        losses = [store.loss(run) for run in runs] if math.isfinite(best.losses[best.values]) else [math.inf]
        if None in losses:
            return None
        if store.digest(runs[0]) not in seen:
            means[arm] = math.fsum(loss or 0.0 for loss in losses)
        seen.add(store.digest(runs[0]))
    ranked = sorted((arm for arm in means if arm != study.baseline), key=means.__getitem__)
    return [study.baseline, *ranked[:number]]


def arms_wanted(study: Study, store: Store, model: str) -> list[str]:
    """Return the arms that run on a model; none while the best arms of another model are not known."""
    change = study.changes.get(model)
    if change is None or change.settings_of is None or change.best is None:
        return study.arms_of(model)
    return best_arms(study, store, change.settings_of, change.best) or []


def _beyond(best: Values, tried: Iterable[Values]) -> Values | None:
    """Return the candidate beyond the edge of the best rate; None if it is not at an edge or there is only one rate."""
    settings = dict(best)
    rates = sorted({float(dict(values)["lr"]) for values in tried})
    rate = float(settings["lr"])
    if len(rates) == 1 or rate not in (rates[0], rates[-1]):
        return None
    settings["lr"] = rate * 2 if rate == rates[-1] else rate / 2
    return tuple(sorted(settings.items()))


def needed(study: Study, store: Store) -> tuple[list[StudyRun], dict[tuple[str, str], Chosen]]:
    """Return every run that can start now, in order, and the settings chosen so far.

    Arms are in the file's order, so that a stopped study has its first arms complete.
    """
    todo: list[StudyRun] = []
    chosen: dict[tuple[str, str], Chosen] = {}
    arms = {model: arms_wanted(study, store, model) for model in study.models}
    for arm in study.arms:
        for model in study.models:
            if arm not in arms[model]:
                continue
            missing, best = tuning(study, store, model, arm)
            if best is not None:
                chosen[model, arm] = best
                if math.isfinite(best.losses[best.values]):
                    runs = [StudyRun(model, arm, best.values, seed) for seed in study.at(model).seeds]
                    missing = [run for run in runs if store.load(run) is None]
            todo += missing
    different: dict[object, StudyRun] = {}
    for run in todo:
        different.setdefault(store.digest(run) if store.rows else run, run)
    return list(different.values()), chosen


def collect(study: Study, store: Store) -> StudyResults:
    """Collect every finished run of the study."""
    missing, chosen = needed(study, store)
    runs: dict[StudyRun, JsonObject] = {}
    known, costs = store.costs(), dict[str, dict[str, JsonObject]]()
    for (model, arm), best in chosen.items():
        tuned = [StudyRun(model, arm, values, seed) for values in best.losses for seed in study.tune_seeds]
        evaluated = [StudyRun(model, arm, best.values, seed) for seed in study.at(model).seeds]
        found = {run: store.load(run) for run in (*tuned, *evaluated)}
        runs |= {run: result for run, result in found.items() if result is not None}
        cost = known.get(model, {}).get(arm, {})
        if cost.get("run") == store.key(evaluated[0]):
            costs.setdefault(model, {})[arm] = cost
    return StudyResults(study.model_dump(mode="json"), study.baseline, runs, chosen, costs, missing)
