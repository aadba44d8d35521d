"""`mols-ds compare` on the two ranks of a launched job: a small study from its file to its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.helpers.harness import ROOT, run_ranks


def compare(study: str, out: str) -> int:
    """The command, on a rank of the harness."""
    from mols_ds import cli

    return cli.main(["compare", study, "--out", out])


@pytest.mark.distributed
def test_a_small_study_is_trained_and_reported(tmp_path: Path) -> None:
    """Each arm at one rate, with a tuning and an evaluation seed. The whole command: tests/apps/test_compare.py."""
    content = yaml.safe_load((ROOT / "studies" / "smoke.yaml").read_text("utf-8"))
    content["data"]["source"] = str(ROOT / "mols_ds" / "core")
    content |= {"models": {"vocab": content["models"]["vocab"]}, "lr": [1.6e-2], "seeds": [1], "costs": False}
    study, out = tmp_path / "small.yaml", tmp_path / "out"
    study.write_text(yaml.safe_dump(content), "utf-8")
    assert run_ranks(compare, 2, str(study), str(out), timeout=200) == [0, 0]
    results = [json.loads(path.read_text("utf-8")) for path in (out / "runs").glob("*.json")]
    assert sorted((r["arm"], r["seed"]) for r in results) == [(a, s) for a in ("adam", "mols") for s in (0, 1)]
    for result in results:
        assert result["steps"] == 20 and result["val_curve"]["loss"][-1] < result["val_curve"]["loss"][0]
        assert bool(result["alphas"]) == (result["arm"] == "mols")
    for name in ("report.md", "report.html", "results.csv", "table.csv", "summary.json"):
        assert (out / name).stat().st_size > 0
