"""Result rows: one line per run, what a study makes of them, and models with changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mols_ds.apps.study import rows
from mols_ds.apps.study.rows import Rows, difference, made
from mols_ds.apps.study.runs import Store, StudyRun, arm_config, collect, needed
from mols_ds.errors import MolsConfigError
from tests.unit.study_results import result
from tests.unit.test_study_runs import ARMS, MODEL, lr, study_of

LATER = {"models": {"small": MODEL, "long": MODEL}}
CONSTANTS: dict[str, Any] = {
    "adam": {},
    "four": {"mols": {"fixed_alphas": {"embedding": 4.0}}},
    "tuned": {"mols": {}, "grid": {"mols.fixed_alphas.embedding": [2.0, 4.0]}},
}


@pytest.fixture(autouse=True)
def no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit test starts no process: tests/apps/test_study_rows.py has the real commit."""
    rows._constant.cache_clear()
    monkeypatch.setattr(rows, "_git", lambda _, *arguments: "0" * 40 if arguments[0] == "rev-parse" else "")


def finish(store: Store, run: StudyRun, loss: float, **more: Any) -> None:
    """Write the row of a run that was never trained."""
    content = result(run.model, run.arm, run.lr, run.seed, loss, values=dict(run.values), losses="0", **more)
    store.save(run, content)


def test_a_row_keeps_what_a_report_reads_and_says_what_made_it(tmp_path: Path) -> None:
    kept = Rows(tmp_path / "deep" / "rows.jsonl")
    curve = {"step": list(range(1, 201)), "tokens": list(range(200)), "loss": [1 / 3] * 200}
    report = {"groups": {"vo": {"snr": 1 / 3, "clamped": False}}, "versions": {}, "samples": 32}
    kept.add("k", {**result("m", "a", 1e-3, 1, 2 / 3), "curve": curve, "report": report})
    (text,) = kept.path.read_text("utf-8").splitlines()
    row = json.loads(text)
    assert row == kept.read()["k"] and row["val_loss"] == 2 / 3, "losses keep their bits"
    assert row["curve"]["step"] == list(range(10, 201, 10)) and len(row["curve"]["loss"]) == 20
    assert row["report"] == {"groups": {"vo": {"snr": 0.33333, "clamped": False}}}
    assert set(row["made"]) == {"commit", "processor", "versions", "threads", "ended"} and row["made"]["processor"]
    assert made()["commit"] == "0" * 40


def test_a_line_cut_by_a_kill_is_skipped_and_the_next_row_gets_a_line_of_its_own(tmp_path: Path) -> None:
    kept = Rows(tmp_path / "rows.jsonl")
    kept.add("a", result("m", "a", 1e-3, 1, 1.0))
    whole = kept.path.read_text("utf-8")
    kept.path.write_text(whole + whole[: len(whole) // 2].replace('"a"', '"b"'), "utf-8")
    assert set(kept.read()) == {"a"}
    kept.add("b", result("m", "a", 1e-3, 1, 2.0))
    kept.add("a", result("m", "a", 1e-3, 1, 3.0))  # from another machine
    assert {key: row["val_loss"] for key, row in kept.read().items()} == {"a": 1.0, "b": 2.0}


def test_a_study_goes_on_from_the_rows_and_arms_with_equal_settings_share_them(tmp_path: Path) -> None:
    study = study_of(tmp_path, arms=CONSTANTS, lr=[1e-3], rows="kept/rows.jsonl")
    assert study.rows == str(tmp_path / "kept" / "rows.jsonl"), "beside the study file"
    store = Store(study, tmp_path / "out")
    todo, _ = needed(study, store)
    assert [run.arm for run in todo] == ["adam", "four", "tuned"], "tuned at 4 is the run of four"
    for run, loss in zip(todo, (3.0, 2.5, 2.8), strict=True):
        finish(store, run, loss)
    elsewhere = Store(study_of(tmp_path, arms=CONSTANTS, lr=[1e-3], rows="kept/rows.jsonl"), tmp_path / "other")
    todo, chosen = needed(study, elsewhere)
    assert dict(chosen["small", "tuned"].values)["mols.fixed_alphas.embedding"] == 4.0
    assert [(run.arm, run.seed) for run in todo] == [("adam", 1), ("adam", 2), ("four", 1), ("four", 2)]
    finish(elsewhere, todo[2], 2.4)
    found = collect(study, elsewhere)
    both = [r["val_loss"] for run, r in found.runs.items() if run.seed == 1 and run.arm in ("four", "tuned")]
    assert both == [2.4, 2.4]


def test_a_model_has_its_changes(tmp_path: Path) -> None:
    change = {"batch": {"sequences": 2, "length": 32}, "budget": {"steps": 7}, "params": {"weight_decay": 0.1}}
    study = study_of(tmp_path, **LATER, changes={"long": {**change, "seeds": [5]}})
    store = Store(study, tmp_path / "out")
    small, large = (StudyRun(model, "adam", lr(1e-3), 1) for model in ("small", "long"))
    assert store.digest(small) != store.digest(large)
    assert study.at("small") is study and (study.at("long").steps, study.at("long").seeds) == (7, (5,))
    config = arm_config(study.at("long"), "adam", lr(1e-3))
    assert config["train_batch_size"] == 2 and config["optimizer"]["params"] == {"weight_decay": 0.1, "lr": 1e-3}


def test_the_best_arms_of_a_model_run_on_another_with_their_settings(tmp_path: Path) -> None:
    arms = {**CONSTANTS, "mols": {"mols": {}}}
    changes = {"long": {"settings_of": "small", "best": 2, "budget": {"steps": 40}, "seeds": [7]}}
    study = study_of(tmp_path, **LATER, arms=arms, lr=[1e-3, 2e-3], extend=0, changes=changes, rows="rows.jsonl")
    store = Store(study, tmp_path / "out")
    losses = {"adam": 3.0, "four": 2.5, "tuned": 2.6, "mols": 2.7}
    while todo := [run for run in needed(study, store)[0] if run.model == "small"]:
        assert not [run for run in needed(study, store)[0] if run.model == "long"], "before every arm is known"
        finish(store, todo[0], losses[todo[0].arm] + (todo[0].lr == 1e-3))
    later = needed(study, store)[0]
    assert [(run.arm, run.lr, run.seed) for run in later] == [(a, 2e-3, 7) for a in ("adam", "four", "mols")], (
        "tuned chose the settings of four, so it is no arm of its own"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"big": {}}, 'changes: "big" is not one of the models'),
        ({"small": {"seeds": [1, 1]}}, "changes.small.seeds: each seed once"),
        ({"small": {"settings_of": "small"}}, 'changes.small.settings_of: "small" is not one of long'),
        ({"small": {"best": 2}}, "changes.small.best: needs settings_of"),
        ({"small": {"batches": {}}}, "unknown key"),
    ],
)
def test_a_mistake_in_changes_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(MolsConfigError, match=said):
        study_of(tmp_path, **LATER, changes=changes)


@pytest.mark.parametrize("key", ["primary", "secondary"])
def test_a_question_about_an_unknown_arm_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(MolsConfigError, match=f'{key}: "sgd" is not one of the arms'):
        study_of(tmp_path, **{key: ["mols", "sgd"]}, arms=ARMS)


def test_a_repeated_run_names_what_differs() -> None:
    old = {**result("m", "a", 1e-3, 1, 2.0), "losses": "0", "made": {"commit": "1", "threads": 1, "ended": "then"}}
    new = {**old, "made": {"commit": "1", "threads": 2, "ended": "now"}}
    assert difference(old, new) == ""
    said = difference(old, {**new, "val_loss": 2.0 + 1e-15, "losses": "1"})
    assert (
        said.startswith("val_loss 2.0 is now 2.000000000000001; losses 0 is now 1 (made by") and "'threads': 2" in said
    )
