"""Study files and the order of runs: tuning, the next runs, and the effect of a changed file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from mols_ds.apps.study.runs import Store, StudyRun, arm_config, collect, needed, tuning
from mols_ds.apps.study.spec import Study, load_study
from mols_ds.errors import MolsConfigError

MODEL: dict[str, Any] = {"model_type": "llama", "vocab_size": 300, "hidden_size": 16}
ARMS: dict[str, Any] = {
    "adam": {"optimizer": "AdamW"},
    "mols": {"optimizer": "AdamW", "mols": {"samples": 8}},
}
STUDIES = Path(__file__).parents[2] / "studies"


def content(**changes: Any) -> dict[str, Any]:
    base = {
        "name": "test",
        "models": {"small": MODEL},
        "batch": {"sequences": 4, "length": 32},
        "budget": {"steps": 20},
        "lr": [1e-3, 2e-3, 4e-3],
        "extend": 2,
        "seeds": [1, 2],
        "arms": ARMS,
    }
    return {**base, **changes}


def study_of(tmp_path: Path, **changes: Any) -> Study:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content(**changes)), "utf-8")
    return load_study(file)


def pretend(store: Store, run: StudyRun, loss: float | None) -> None:
    """Write a result like a finished run; no test here depends on its training."""
    store.save(run, {"val_loss": loss})


def lr(rate: float) -> tuple[tuple[str, float], ...]:
    return (("lr", rate),)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sedes": [1]}, '"sedes": unknown key'),
        ({"baseline": "sgd"}, '"sgd" is not one of the arms adam, mols'),
        ({"budget": {"steps": 5, "tokens": 100}}, "give either steps or tokens"),
        ({"budget": {}}, "give either steps or tokens"),
        ({"lr": []}, '"lr"'),
        ({"lr": [-1.0]}, '"lr.0"'),
        ({"seeds": [1, 1]}, "each seed once"),
        ({"arms": {**ARMS, "x": {"models": ["big"]}}}, '"big" is not one of small'),
        ({"arms": {**ARMS, "x": {"mols": {"samples": 1}}}}, "mols.samples"),
        ({"arms": {**ARMS, "x": {"mols": {"sample": 8}}}}, "did you mean"),
        (
            {"arms": {**ARMS, "x": {"grid": {"weight_decay": [0.1]}}}},
            "must be params.NAME, mols.NAME or deepspeed.NAME",
        ),
        ({"arms": {**ARMS, "x": {"grid": {"mols.samples": [8]}}}}, "without a mols section"),
        ({"arms": {**ARMS, "a/b": {}}}, '"a/b" is not a plain name'),
        ({"models": {"small": "nowhere.json"}}, "nowhere.json: no such file"),
        ({"snr": {"every": 5, "arms": ["sgd"]}}, 'snr.arms: "sgd"'),
    ],
)
def test_a_mistake_in_a_study_is_one_line_that_names_the_key(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(MolsConfigError) as error:
        study_of(tmp_path, **changes)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_missing_or_no_yaml_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(MolsConfigError, match="no such file"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1", "utf-8")
    with pytest.raises(MolsConfigError, match="not YAML"):
        load_study(tmp_path / "bad.yaml")
    (tmp_path / "half.yaml").write_text(yaml.safe_dump(content()) + 'baseline: "\\uD800"\n', "utf-8")
    with pytest.raises(MolsConfigError, match="half of a surrogate pair in"):
        load_study(tmp_path / "half.yaml")


def test_tuning_goes_on_beyond_an_edge_as_often_as_allowed(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    store = Store(study, tmp_path / "out")
    todo, chosen = tuning(study, store, "small", "adam")
    assert [run.lr for run in todo] == [1e-3, 2e-3, 4e-3] and chosen is None
    assert {run.seed for run in todo} == {0}, "tuned on a seed that is not among the evaluation seeds"
    for run, loss in zip(todo, (3.0, 2.9, 2.8), strict=True):
        pretend(store, run, loss)
    for rate, loss in ((8e-3, 2.7), (1.6e-2, 2.6)):
        todo, chosen = tuning(study, store, "small", "adam")
        assert [run.lr for run in todo] == [rate] and chosen is None
        pretend(store, todo[0], loss)
    todo, chosen = tuning(study, store, "small", "adam")
    assert todo == [] and chosen is not None
    assert chosen.values == lr(1.6e-2) and chosen.edge, "after two extensions it stops, and says where it stands"
    assert len(chosen.losses) == 5


def test_a_best_rate_inside_is_taken_and_a_diverged_run_never_wins(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    store = Store(study, tmp_path / "out")
    for rate, loss in ((1e-3, 2.9), (2e-3, 2.8), (4e-3, None)):
        pretend(store, StudyRun("small", "adam", lr(rate), 0), loss)
    todo, chosen = tuning(study, store, "small", "adam")
    assert todo == [] and chosen is not None and chosen.values == lr(2e-3) and not chosen.edge
    assert chosen.losses[lr(4e-3)] == math.inf


def test_an_arm_whose_every_run_diverged_gets_no_evaluation_runs(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    store = Store(study, tmp_path / "out")
    for rate in study.lr:
        pretend(store, StudyRun("small", "adam", lr(rate), 0), None)
    todo, chosen = needed(study, store)
    assert {run.arm for run in todo} == {"mols"} and ("small", "adam") in chosen


def test_evaluation_seeds_follow_the_tuning_and_the_first_arm_comes_first(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    store = Store(study, tmp_path / "out")
    for rate, loss in ((1e-3, 2.9), (2e-3, 2.8), (4e-3, 3.0)):
        pretend(store, StudyRun("small", "adam", lr(rate), 0), loss)
    todo, _ = needed(study, store)
    assert todo[:2] == [StudyRun("small", "adam", lr(2e-3), 1), StudyRun("small", "adam", lr(2e-3), 2)]
    assert [run.arm for run in todo[2:]] == ["mols"] * 3
    for run in todo[:2]:
        pretend(store, run, 2.75)
    results = collect(study, store)
    assert len(results.runs) == 5 and [run.arm for run in results.missing] == ["mols"] * 3


def test_every_combination_of_a_grid_is_tuned_and_only_the_rate_is_extended(tmp_path: Path) -> None:
    hand = {"optimizer": "AdamW", "lr": [1e-3, 2e-3], "mols": {"fixed_alphas": {"vo": 1.0}}}
    hand["grid"] = {"mols.fixed_alphas.embedding": [2.0, 4.0]}
    study = study_of(tmp_path, arms={**ARMS, "hand": hand})
    store = Store(study, tmp_path / "out")
    todo, _ = tuning(study, store, "small", "hand")
    assert len(todo) == 4
    config = arm_config(study, "hand", todo[0].values)
    assert config["mols"]["fixed_alphas"] == {"vo": 1.0, "embedding": 2.0}
    assert config["optimizer"]["params"]["lr"] == 1e-3
    for run in todo:
        settings = dict(run.values)
        best = (settings["lr"], settings["mols.fixed_alphas.embedding"]) == (2e-3, 4.0)
        pretend(store, run, 2.0 if best else 3.0)
    (further,), _ = tuning(study, store, "small", "hand")
    assert dict(further.values) == {"lr": 4e-3, "mols.fixed_alphas.embedding": 4.0}


def test_what_a_study_says_reaches_the_config_of_an_arm(tmp_path: Path) -> None:
    plain = arm_config(study_of(tmp_path), "adam", lr(1e-3))
    assert plain["gradient_clipping"] == 1.0 and plain["zero_optimization"] == {"stage": 0}
    assert plain["bf16"] == {"enabled": False}, "fp32 unless asked for, whatever the machine is good at"
    own = {"optimizer": "Lion", "source": "library", "deepspeed": {"zero_optimization": {"stage": 2}}}
    shared = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1, "overlap_comm": False}}
    study = study_of(tmp_path, clip=0.5, deepspeed=shared, arms={**ARMS, "lion": own})
    config = arm_config(study, "lion", lr(1e-3))
    assert config["gradient_clipping"] == 0.5 and config["bf16"] == {"enabled": True}
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": False}, "the arm's own win"
    assert config["optimizer"] == {"type": "Lion", "source": "library", "params": {"lr": 1e-3}}


def test_a_result_belongs_to_the_settings_that_made_it(tmp_path: Path) -> None:
    run = StudyRun("small", "mols", lr(1e-3), 0)

    def key(**changes: Any) -> str:
        return Store(study_of(tmp_path, **changes), tmp_path).key(run)

    first = key()
    assert key(seeds=[3, 4, 5]) == first, "more seeds repeat nothing"
    assert key(arms={**ARMS, "more": {"optimizer": "NAdam"}}) == first, "a further arm repeats nothing"
    assert key(extend=0, name="other") == first
    others = [
        key(budget={"steps": 21}),
        key(batch={"sequences": 8, "length": 32}),
        key(models={"small": {**MODEL, "hidden_size": 32}}),
        key(arms={**ARMS, "mols": {"optimizer": "AdamW", "mols": {"samples": 16}}}),
        key(clip=0.5),
        key(evaluation={"sequences": 8}),
        key(data={"source": "other"}),
    ]
    assert len({first, *others}) == 8


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    store = Store(study, tmp_path)
    run = StudyRun("small", "adam", lr(1e-3), 0)
    store.file(run).parent.mkdir(parents=True)
    store.file(run).write_text('{"val_loss": 1', "utf-8")
    with pytest.raises(MolsConfigError, match=r"is damaged.*remove it"):
        store.load(run)
