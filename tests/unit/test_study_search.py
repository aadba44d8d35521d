"""The random search over multipliers on known landscapes, and how a study continues it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from mols_ds.apps.study.runs import Store, StudyRun, arm_config, needed, tuning
from mols_ds.apps.study.search import PREFIX, Searched, search
from mols_ds.apps.study.spec import Study, Values
from mols_ds.errors import MolsConfigError
from tests.unit.test_study_rows import LATER
from tests.unit.test_study_runs import ARMS, lr, pretend, study_of

GROUPS = ("embedding", "head", "vo")
BEST = {"embedding": 6.0, "head": 1.5, "vo": 0.7}
START: Values = (("lr", 4e-3), (PREFIX + "embedding", 2.0))


def bowl(values: Values, seed: int) -> float:
    """Loss with its minimum of 3 + the seed's effect at `BEST`."""
    alphas = {name.removeprefix(PREFIX): float(value) for name, value in values if name != "lr"}
    return 3 + 0.01 * seed + sum(math.log2(alphas[group] / best) ** 2 for group, best in BEST.items())


def complete(runs: int, seeds: tuple[int, ...] = (0, 1)) -> tuple[Searched, list[tuple[Values, int]]]:
    """Run a search one run at a time. Returns its end and its runs in order."""
    known: dict[tuple[Values, int], float] = {}
    while (found := search(START, GROUPS, seeds, runs, lambda v, s: known.get((v, s)))).wanted is not None:
        assert found.wanted not in known, "a finished run is wanted again"
        known[found.wanted] = bowl(*found.wanted)
    return found, list(known)


def test_the_search_starts_at_the_given_point_and_ends_near_the_best_within_its_budget() -> None:
    found, runs = complete(60)
    assert dict(runs[0][0]) == {"lr": 4e-3, PREFIX + "embedding": 2.0, PREFIX + "head": 1.0, PREFIX + "vo": 1.0}
    assert len(runs) == found.spent == 60
    assert found.best is not None and found.losses[found.best] == min(found.losses.values())
    assert bowl(found.best, 0) < 3.15 < bowl(runs[0][0], 0) - 2, "near the best; it started far from it"
    assert {dict(values)["lr"] for values, _ in runs} == {4e-3}


def test_a_proposal_that_is_worse_on_the_first_seed_costs_one_run() -> None:
    found, runs = complete(40)
    seeds = [[seed for _, seed in group] for _, group in itertools.groupby(runs, key=lambda run: run[0])]
    assert {tuple(ran) for ran in seeds[:-1]} == {(0,), (0, 1)} and len(found.losses) == seeds.count([0, 1])
    assert seeds.count([0]) > seeds.count([0, 1]) > 3


def test_a_longer_budget_continues_the_same_search() -> None:
    _, short = complete(20)
    _, long = complete(30)
    assert long[:20] == short


def test_a_box_without_an_untried_point_ends_the_search() -> None:
    point = (("lr", 1.0), (PREFIX + "vo", 1.0))
    found = search(point, ("vo",), (0,), 500, lambda values, _: abs(math.log2(float(dict(values)[PREFIX + "vo"]))))
    assert found.wanted is None and found.spent < 500 and found.best == tuple(sorted(point))


def with_search(tmp_path: Path, runs: int = 3) -> Study:
    arms = {
        **ARMS,
        "constant": {"mols": {"fixed_alphas": {"embedding": 4.0}}, "lr": [1e-3]},
        "search": {"mols": {}, "search": {"start": "constant", "runs": runs}},
    }
    return study_of(tmp_path, arms=arms)


def test_a_study_waits_for_the_start_of_a_search_and_evaluates_what_it_found(tmp_path: Path) -> None:
    study = with_search(tmp_path)
    store = Store(study, tmp_path / "out")
    assert tuning(study, store, "small", "search") == ([], None)
    pretend(store, StudyRun("small", "constant", lr(1e-3), 0), 3.0)
    for number in range(3):
        (run,), chosen = tuning(study, store, "small", "search")
        assert chosen is None and run.seed == 0
        if number == 0:
            alphas = {"embedding": 4.0, "head": 1.0, "qk": 1.0, "vo": 1.0, "mlp": 1.0}
            assert arm_config(study, "search", run.values)["mols"]["fixed_alphas"] == alphas
            first = run
        pretend(store, run, 2.9 + number)
    todo, chosen = tuning(study, store, "small", "search")
    assert todo == [] and chosen is not None and chosen.values == first.values and chosen.spent == 3
    wanted = [run for run in needed(study, store)[0] if run.arm == "search"]
    assert wanted == [StudyRun("small", "search", first.values, seed) for seed in study.seeds]


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ({"search": {"start": "adam"}}, "search: needs a mols section"),
        ({"mols": {}, "lr": [1e-3], "search": {"start": "adam"}}, "neither lr nor grid"),
        ({"mols": {}, "search": {"start": "sgd"}}, 'search.start: "sgd" is not one of the arms'),
        ({"mols": {}, "search": {"start": "x"}}, 'search.start: "x" searches too'),
        ({"mols": {}, "search": {"start": "adam", "run": 3}}, "unknown key"),
        ({"mols": {}, "search": {"start": "other"}}, 'arms.x.search.start: "other" does not run on small'),
    ],
)
def test_a_mistake_in_a_search_is_named(tmp_path: Path, arm: dict[str, object], said: str) -> None:
    with pytest.raises(MolsConfigError, match=said):
        study_of(tmp_path, models=LATER["models"], arms={**ARMS, "other": {"models": ["long"]}, "x": arm})
