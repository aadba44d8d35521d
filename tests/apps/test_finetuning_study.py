"""studies/finetuning.py: its data, the runs that it still needs, and its report. Nothing is trained."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mols_ds.apps.study.paired import compare
from tests.apps.command import ROOT

FILE = ROOT / "studies" / "finetuning.py"
LINES = [f"Return the number {number} of the {'very ' * (number % 7)}long list." for number in range(60)]


@pytest.fixture(scope="module")
def study() -> Any:
    spec = importlib.util.spec_from_file_location("finetuning_study", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # NamedTuple looks its module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Functions with LINES as docstrings in two files, each line twice; and functions that are no examples."""
    folder = tmp_path / "package"
    folder.mkdir()
    for half in (0, 1):
        text = [f'def f{n}(x: int, y=1):\n    """{line}\n\n    More.\n    """\n' for n, line in enumerate(LINES)]
        text += ['def _private():\n    """Nobody outside may call this."""\n', "def silent(): ...\n"]
        text += ['class A:\n    """Not a function at all, a class."""\n', 'def short():\n    """Short."""\n']
        (folder / f"part{half}.py").write_text("\n".join(text if half else reversed(text)), "utf-8")
    (folder / "broken.py").write_text("def (", "utf-8")
    return folder


def test_data_are_the_same_each_time_and_no_line_is_on_both_sides(study: Any, sources: Path) -> None:
    found = study.examples([sources])
    assert found == study.examples([sources])
    assert sorted(row["completion"] for row in found) == sorted(LINES)  # once each
    by_line = {row["completion"]: row["prompt"] for row in found}
    assert by_line[LINES[3]] == 'def f3(x: int, y=1):\n    """'
    (sources / "part0.py").unlink()
    (sources / "part1.py").write_text("\n".join(f'def f(self):\n    """{line}"""' for line in LINES[::2]), "utf-8")
    rest = [row["completion"] for row in study.examples([sources])]
    assert rest == [row["completion"] for row in found if row["completion"] in LINES[::2]] != LINES[::2]


def test_files_split_the_lines_and_the_task_asks_held_out_ones(
    study: Any, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sources / "__init__.py").touch()
    monkeypatch.syspath_prepend(sources.parent)
    for name, value in {"PACKAGES": ["package"], "HELD_OUT": 25, "TRAINING": 30, "ASKED": 10}.items():
        monkeypatch.setattr(study, name, value)
    for out in ("first", "second"):
        study.main(["data", "--out", str(tmp_path / out)])
    first, second = tmp_path / "first", tmp_path / "second"
    assert (first / "data.sha256").read_text("utf-8") == (second / "data.sha256").read_text("utf-8")
    train, held_out = (
        [json.loads(line)["completion"] for line in (first / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("train", "held_out")
    )
    assert len(train) == 30 and len(held_out) == 25 and not set(train) & set(held_out)
    task = yaml.safe_load((first / "task" / f"{study.TASK}.yaml").read_text("utf-8"))
    questions = [
        json.loads(line) for line in Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    ]
    assert task["task"] == study.TASK and len(questions) == 10
    assert {line for question in questions for line in question["choices"]} <= set(held_out)


def test_questions_have_one_right_answer_of_similar_length(study: Any, sources: Path) -> None:
    held_out = study.examples([sources])
    asked = study.questions(held_out, 40)
    assert asked == study.questions(held_out, 40) and len(asked) == 40
    for question, example in zip(asked, held_out, strict=False):
        assert question["prompt"] == example["prompt"]
        assert question["choices"][question["answer"]] == example["completion"]
        assert len(set(question["choices"])) == 4
        assert set(question["choices"]) <= {row["completion"] for row in held_out}
        assert max(abs(len(line) - len(example["completion"])) for line in question["choices"]) <= 15
    assert {question["answer"] for question in asked} == {0, 1, 2, 3}


def loss_at(rate: float, best: float) -> float:
    return 3.0 + abs(math.log(rate / best))


def test_runs_are_tuned_extended_at_an_edge_and_then_repeated_with_fresh_seeds(study: Any) -> None:
    best = {arm: study.RATES[arm.partition("-")[0]][1] for arm in study.ARMS}
    best["full"] = study.RATES["full"][-1] * 2  # one further rate finds it, the next one shows that it is no edge
    best["lora"] = study.RATES["lora"][0] / 1000  # never found: two further rates, then an edge
    losses: dict[Any, float] = {}
    while run := study.next_run(losses):
        assert run not in losses
        losses[run] = loss_at(run.rate, best[run.arm])
    tuned = {arm: sorted(run.rate for run in losses if run[0] == arm and run.seed == 0) for arm in study.ARMS}
    assert tuned["full"] == [*study.RATES["full"], best["full"], best["full"] * 2]
    assert tuned["lora"] == [study.RATES["lora"][0] / 4, study.RATES["lora"][0] / 2, *study.RATES["lora"]]
    assert tuned["dora-mols"] == [*study.RATES["dora"]]
    assert study.tuning("full", losses)[1:] == (best["full"], False)
    assert study.tuning("lora", losses)[1:] == (tuned["lora"][0], True)
    fresh = [run for run in losses if run.seed != 0]
    assert sorted({(run.arm, run.seed) for run in fresh}) == sorted((a, s) for a in study.ARMS for s in study.SEEDS)
    assert all(run.rate == study.tuning(run.arm, losses)[1] for run in fresh) and len(fresh) == 30


def test_a_diverged_run_is_never_the_best(study: Any) -> None:
    *rates, last = study.RATES["full"]
    rows = [{"arm": "full", "rate": rate, "seed": 0, "val_loss": 4 - rate} for rate in rates]
    rows.append({"arm": "full", "rate": last, "seed": 0, "val_loss": None})
    assert study.tuning("full", study.losses_of(rows)) == ([*rates, last], rates[-1], False)


def test_report_has_the_paired_differences_of_the_fresh_seeds(study: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"arm": "checkpoint", "rate": 0.0, "seed": 0, "val_loss": 6.5, "evaluation": {"acc": 0.25}}
    ]
    for arm in study.ARMS:
        for rate in study.RATES[arm.partition("-")[0]]:
            rows.append(
                {"arm": arm, "rate": rate, "seed": 0, "val_loss": loss_at(rate, study.RATES[arm.partition("-")[0]][1])}
            )
    losses = study.losses_of(rows)
    final: dict[str, dict[int, float]] = {}
    for number, arm in enumerate(study.ARMS):
        final[arm] = {seed: 3.0 + 0.1 * number + 0.01 * (seed * (number + 1) % 4) for seed in study.SEEDS}
        alphas = {"qk": 2.0, "vo": 1.0} if arm.endswith("mols") else {}
        for seed, loss in final[arm].items():
            known = {"val_loss": loss, "evaluation": {"acc": 0.5 + number / 100}, "alphas": alphas}
            rows.append({"arm": arm, "rate": study.tuning(arm, losses)[1], "seed": seed, **known})
    text = study.report(rows)
    assert "| checkpoint |  |  | 6.5000 | 25.0% |  |" in text
    wanted = compare(final["full-mols"], final["full"])
    assert wanted is not None and wanted.low is not None
    (line,) = [line for line in text.splitlines() if line.startswith("| full-mols - full |")]
    assert f"{wanted.mean:+.4f} [{wanted.low:+.4f}, {wanted.high:+.4f}]" in line and "+1.0 [+1.0, +1.0]" in line
    assert "| lora-mols | 2.00 | 1.00 |" in text
    few = study.report(json.loads(json.dumps(rows[:10])))  # in the middle of tuning
    assert "checkpoint" in few and "full-mols - full" not in few
