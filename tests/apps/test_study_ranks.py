"""`mols-ds compare` on the two ranks of a launched job: a small study from its file to its report."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.harness import ROOT, run_ranks

pytestmark = pytest.mark.distributed
ADAM = {"optimizer": "AdamW", "params": {"torch_adam": True}}


def compare(study: str, out: str) -> tuple[int, str]:
    """Run the command on a rank of the harness. Returns its status and stderr."""
    from mols_ds import cli

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        return cli.main(["compare", study, "--out", out]), said.getvalue()


def run_study(folder: Path, **changes: Any) -> tuple[list[tuple[int, str]], list[dict[str, Any]]]:
    """studies/smoke.yaml with one model, one rate and one evaluation seed: what each rank gave, and the results."""
    content = yaml.safe_load((ROOT / "studies" / "smoke.yaml").read_text("utf-8"))
    content["data"]["source"] = str(ROOT / "mols_ds" / "core")
    content |= {"models": {"vocab": content["models"]["vocab"]}, "lr": [1.6e-2], "seeds": [1], "costs": False}
    study, out = folder / "small.yaml", folder / "out"
    study.write_text(yaml.safe_dump(content | changes), "utf-8")
    ranks = run_ranks(compare, 2, str(study), str(out), timeout=200)
    return ranks, [json.loads(path.read_text("utf-8")) for path in (out / "runs").glob("*.json")]


def test_a_small_study_is_trained_and_reported(tmp_path: Path) -> None:
    """Each arm with a tuning and an evaluation seed. The whole command: tests/apps/test_compare.py."""
    ranks, results = run_study(tmp_path)
    assert [status for status, _ in ranks] == [0, 0]
    assert sorted((r["arm"], r["seed"]) for r in results) == [(a, s) for a in ("adam", "mols") for s in (0, 1)]
    for result in results:
        assert result["steps"] == 20 and result["val_curve"]["loss"][-1] < result["val_curve"]["loss"][0]
        assert bool(result["alphas"]) == (result["arm"] == "mols")
    for name in ("report.md", "report.html", "results.csv", "table.csv", "summary.json"):
        assert (tmp_path / "out" / name).stat().st_size > 0


@pytest.mark.tier("all")
def test_an_arm_that_cannot_train_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    arms = {"adam": ADAM, "bad": {**ADAM, "mols": {"reference": "nowhere"}}}
    ranks, results = run_study(tmp_path, arms=arms)
    assert [status for status, _ in ranks] == [1, 1]
    assert 'vocab-bad-lr0.016-s0 failed: "mols.reference": no group "nowhere"' in ranks[0][1]
    assert sorted((r["arm"], r["seed"]) for r in results) == [("adam", 0), ("adam", 1)]
