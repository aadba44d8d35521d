"""`mols-ds compare` as a user runs it: killed half-way, started again, finished, changed.

studies/smoke.yaml with one of its two models; the whole file in the full tier.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import yaml

from mols_ds import cli
from tests.apps.command import run
from tests.helpers.harness import RANK_ENVIRONMENT, ROOT
from tests.helpers.ports import free_port

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(700), pytest.mark.tier("all")]  # quick: test_study_ranks.py
SECONDS = 300  # a bound for a busy machine; alone it takes 40
RUNS = 8  # of a model: 2 arms x (2 rates with the tuning seed + 2 seeds at the best one)
SMOKE = ROOT / "studies" / "smoke.yaml"


class Study(NamedTuple):
    """A study file, its folder of results, and the models in it."""

    file: Path
    out: Path
    models: tuple[str, ...]

    @property
    def runs(self) -> int:
        return RUNS * len(self.models)


def finished(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*.json")}


def start(file: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mols_ds.study", str(file), "--out", str(out), "--jobs", "2"]
    environment = {**os.environ, **RANK_ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def end_of(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def content(**changes: object) -> dict[str, object]:
    """That of the smoke study, from another folder; `changes` of keys at the top."""
    found = yaml.safe_load(SMOKE.read_text("utf-8"))
    found["data"]["source"] = str(ROOT / "mols_ds")
    return {**found, **changes}


def vocab() -> dict[str, object]:
    """The one model of the small study."""
    return {"vocab": yaml.safe_load(SMOKE.read_text("utf-8"))["models"]["vocab"]}


@pytest.fixture(scope="module", params=["small", pytest.param("whole", marks=pytest.mark.tier("full"))])
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study that was killed when a few runs had finished, then run to its end; the log of the second part beside."""
    out = tmp_path_factory.mktemp("study")
    file, models = SMOKE, ("vocab", "block")
    if request.param == "small":
        file, models = out / "small.yaml", ("vocab",)
        file.write_text(yaml.safe_dump(content(models=vocab())), "utf-8")
    expected = RUNS * len(models)
    process = start(file, out)
    try:
        deadline = time.monotonic() + SECONDS
        while len(finished(out)) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no runs finished"
            time.sleep(0.1)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate()
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive, "workers outlived the process that was killed"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    before = finished(out)
    assert 3 <= len(before) < expected
    process = start(file, out)
    stdout, stderr = end_of(process)
    assert process.returncode == 0, stderr[-3000:]
    after = finished(out)
    assert {path: after[path] for path in before} == before, "a finished run was trained again"
    lines = [line for line in stdout.splitlines() if line.startswith("[")]
    assert len(lines) == expected - len(before), stdout
    (out / "log.txt").write_text(stdout, "utf-8")
    return Study(file, out, models)


def test_a_killed_study_goes_on_and_repeats_no_finished_run(study: Study) -> None:
    results = [json.loads(path.read_text("utf-8")) for path in finished(study.out)]
    assert len(results) == study.runs
    assert not list((study.out / "running").glob("*-s*")), "folders of runs are removed when their result is there"
    for result in results:
        assert result["steps"] == 20 and result["tokens"] == 20 * 4 * 32
        assert result["probe_passes"] == (8 if result["arm"] == "mols" else 0)
        assert result["val_curve"]["step"] == [5, 10, 15, 20]
        assert result["val_curve"]["loss"][-1] == result["val_loss"] < result["val_curve"]["loss"][0]
    seeds = {(r["model"], r["arm"]): set() for r in results}  # type: ignore[var-annotated]
    for r in results:
        seeds[r["model"], r["arm"]].add(r["seed"])
    assert all(found == {0, 1, 2} for found in seeds.values()) and len(seeds) == 2 * len(study.models)


def test_arms_see_the_same_weights_and_batches(study: Study) -> None:
    """The first logged training loss is taken before any update: equal for all arms and rates of a seed."""
    first: dict[tuple[str, int], set[float]] = {}
    for path in finished(study.out):
        result = json.loads(path.read_text("utf-8"))
        first.setdefault((result["model"], result["seed"]), set()).add(result["curve"]["loss"][0])
    assert len(first) == 3 * len(study.models) and all(len(losses) == 1 for losses in first.values()), first


def test_snr_curves_are_in_the_evaluation_runs_of_the_named_arms(study: Study) -> None:
    for path in finished(study.out):
        result = json.loads(path.read_text("utf-8"))
        if result["arm"] == "adam" and result["seed"] != 0:
            assert result["snr"]["step"] == [5, 10, 15, 20]
            assert set(result["snr"]["groups"]) == {"embedding", "head", "qk", "vo", "mlp", "other"}
        else:
            assert result["snr"] == {}


def test_costs_are_of_every_arm_at_its_chosen_settings(study: Study) -> None:
    costs = json.loads((study.out / "costs.json").read_text("utf-8"))
    for model in study.models:
        assert costs[model]["adam"]["memory_ratio"] == 1.0
        assert costs[model]["mols"]["memory_ratio"] == 1.0, "nothing is left of the calibration"
        assert costs[model]["adam"]["accumulators"] == 0 < costs[model]["mols"]["accumulators"]


def test_the_report_has_every_arm_and_file(study: Study) -> None:
    out = study.out
    for name in ("report.md", "report.html", "results.csv", "table.csv", "summary.json"):
        assert (out / name).stat().st_size > 0
    assert list(out.glob("*.png"))
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == study.runs
    with (out / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["model"], row["arm"]) for row in rows} == {(m, a) for m in study.models for a in ("adam", "mols")}
    html = (out / "report.html").read_text("utf-8")
    assert "data:image/png;base64" in html and "http://" not in html.replace("http://www.w3.org", "")


@pytest.mark.tier("full")
def test_an_arm_that_cannot_train_is_named_and_the_others_go_on(study: Study, tmp_path: Path) -> None:
    """A further arm is added to the finished study: only its runs are started, and they fail by name."""
    more, model = yaml.safe_load(study.file.read_text("utf-8")), study.models[-1]
    more["data"]["source"] = str(ROOT / "mols_ds")
    more["arms"]["bad"] = {"optimizer": "AdamW", "params": {"torch_adam": True}, "models": [model]}
    more["arms"]["bad"]["mols"] = {"reference": "nowhere"}
    file = tmp_path / "more.yaml"
    file.write_text(yaml.safe_dump(more), "utf-8")
    before = finished(study.out)
    done = run(sys.executable, "-m", "mols_ds.study", file, "--out", study.out, "--jobs", "1", cwd=tmp_path)
    assert done.status == 1
    assert f'{model}-bad-lr0.004-s0 failed: "mols.reference": no group "nowhere"' in done.stderr
    assert "Traceback" not in done.stderr
    assert finished(study.out) == before


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(sys.executable, "-m", "mols_ds.cli", "compare", tmp_path / "none.yaml", cwd=tmp_path)
    assert done.status == 2 and done.stderr.count("\n") == 1 and "no such file" in done.stderr, done.stderr
    for arguments, said in (
        (["--arms", "sgd"], '--arms: "sgd" is not one of adam, mols'),
        (["--jobs", "0"], "--jobs: 0 is not at least 1"),
    ):
        assert cli.main(["compare", str(SMOKE), *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


@pytest.mark.tier("full")
def test_ranks_of_a_launched_job_train_the_same_runs_together(study: Study, tmp_path: Path) -> None:
    """Two ranks under torchrun, half of each batch each: the losses of one process but for the summation order."""
    file, here = tmp_path / "ranks.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(content(models=vocab(), lr=[1.6e-2], seeds=[1], costs=False)), "utf-8")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = run(sys.executable, *launch, "-m", "mols_ds.study", file, "--out", here, cwd=tmp_path)
    assert done.status == 0, done.stderr[-3000:]
    found = {path.name: json.loads(path.read_text("utf-8")) for path in finished(here)}
    assert len(found) == 4
    for name, result in found.items():
        alone = json.loads((study.out / "runs" / name).read_text("utf-8"))
        assert result["val_loss"] == pytest.approx(alone["val_loss"], abs=1e-3)
        assert result["curve"]["loss"][0] == pytest.approx(alone["curve"]["loss"][0], abs=1e-6)
        assert result["alphas"] == pytest.approx(alone["alphas"], rel=1e-4)
    assert done.stdout.count("done, ") == 4, "rank 0 alone says a line a run"
