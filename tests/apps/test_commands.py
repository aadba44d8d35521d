"""The three ways to start the main job, a comparison, a resumed run, and what a user's mistake looks like."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from mols_ds import cli
from mols_ds.training.trainer import TIMED
from tests.apps.command import (
    TINY_CONFIG,
    TRAIN,
    Done,
    events_of,
    job_arguments,
    read_metrics,
    run,
    write_job,
)
from tests.helpers.harness import run_ranks
from tests.helpers.ports import free_port

pytestmark = pytest.mark.jobs
STEPS = 6
# The calibration's window is steps 2 to 5, so that the checkpoint of step 3 is inside it.
ONLINE = {"start": 2, "samples": 4, "mode": "online", "ramp_end": 6}


def ports() -> list[str]:
    return ["--master_port", str(free_port())]


def succeeded(done: Done) -> Done:
    assert done.status == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert "Traceback" not in done.stderr
    return done


def updates(out: Path) -> list[dict[str, Any]]:
    """The metrics without the times, which differ between runs."""
    return [{key: value for key, value in line.items() if key not in TIMED} for line in read_metrics(out)]


def test_shim_compares_both_arms_on_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_job(tmp_path, tensorboard={"enabled": True})
    more = ["--steps", str(STEPS), "--compare", "adam", "--snr-every", "2"]
    arguments = job_arguments(paths, tmp_path / "out", *more)
    done = succeeded(
        run("deepspeed", *ports(), "--num_gpus", "2", "--config", paths["config"], TRAIN, *arguments, cwd=tmp_path)
    )
    assert "2 processes" in done.stdout
    for words in ("Adam", "Adam + MoLS", "perplexity", "alphas: embedding", "mols_report.json", "compare.png"):
        assert words in done.stdout
    out = tmp_path / "out"
    assert (out / "compare.png").stat().st_size > 1000
    assert (out / "mols" / "mols_report" / "mols_report.png").is_file()
    adam, mols = updates(out / "adam"), updates(out / "mols")
    # Probed batches come from a separate stream: up to the calibration both arms see the same and do the same
    assert [line.get("step") for line in adam] == [line.get("step") for line in mols] == [*range(1, STEPS + 1), None]
    assert adam[0]["loss"] == mols[0]["loss"]
    assert adam[1]["loss"] == mols[1]["loss"]
    assert adam[-2]["loss"] != mols[-2]["loss"]
    assert {line.get("phase") for line in adam} == {"disabled", None}
    check_contract(mols)
    logged = [line for line in done.stdout.splitlines() if line.startswith("mols: step ")]
    assert len(logged) == STEPS and all("gradient norm" in line and "tokens/s" in line for line in logged)
    assert sum("held-out" in line for line in logged) == sum("val_loss" in line for line in mols[:-1])
    assert "mols: measuring gradients: batch 4 of 4" in done.stdout.splitlines()
    assert [line["step"] for line in mols if "snr_moments" in line] == [2, 4, 6]
    (measured,) = (line["snr"] for line in mols if "snr" in line)
    found = events_of(out / "tensorboard")
    assert found["Train/Samples/snr_qk"] == pytest.approx([measured["qk"]])
    assert found["Train/Samples/applied_lr_qk"][-1] == pytest.approx(mols[-2]["applied_lrs"]["qk"])
    assert {f"Train/Samples/{name}" for name in ("grad_norm", "alpha_qk", "snr_moments_qk", "lr")} <= set(found)
    assert cli.main(["report", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"SNR and rates over the run: {out / 'mols' / 'mols_run.png'}"
    assert (out / "mols" / "mols_run.png").stat().st_size > 10_000
    summary = json.loads((out / "compare.json").read_text("utf-8"))
    assert summary["mols"]["val_loss"] == mols[-1]["val_loss"]


def check_contract(lines: list[dict[str, Any]]) -> None:
    """The keys that other tools rely on."""
    *steps, final = lines
    for line in steps:
        wanted = {"step", "tokens", "loss", "lr", "multipliers", "phase", "grad_norm", "applied_lrs"}
        assert set(line) - {"val_loss", "run", "snr", "snr_moments"} == wanted
        assert line["tokens"] == line["step"] * 4 * 32
    assert "val_loss" in steps[-1]
    assert set(final) == {"final", "val_loss", "val_ppl", "tokens", "alphas"}
    assert final["final"] is True
    assert math.isclose(final["val_ppl"], math.exp(final["val_loss"]))
    assert set(final["alphas"]) == {"embedding", "head", "qk", "vo", "mlp", "other"}
    assert steps[-1]["phase"] == "fixed"
    assert steps[-1]["multipliers"] == pytest.approx(final["alphas"])


def train(*arguments: str) -> int:
    """train.py on a rank of the harness."""
    from mols_ds.apps.train import main

    return main(list(arguments))


@pytest.mark.tier("all")
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """The stock launcher continues, in mid-calibration, a copy of a checkpoint that a run without launcher made."""
    stage3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "mols": ONLINE}
    paths = write_job(tmp_path, TINY_CONFIG, **stage3)
    whole, part = tmp_path / "whole", tmp_path / "part"
    arguments = ["--steps", str(STEPS), "--save-every", "3", "--activation-checkpointing"]
    given = ["--deepspeed_config", str(paths["config"])]
    assert run_ranks(train, 2, *job_arguments(paths, whole, *arguments), *given, timeout=200) == [0, 0]
    part.mkdir()
    for name in ("metrics.jsonl", "checkpoints/step3", "checkpoints/latest"):
        source = whole / name
        target = part / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (part / "checkpoints" / "latest").write_text("step3", "utf-8")
    stock = [Path(sys.executable).with_name("deepspeed"), *ports(), "--num_gpus", "2", TRAIN]
    resumed = [*job_arguments(paths, part, *arguments), "--resume", *given]
    succeeded(run(*stock, *resumed, cwd=tmp_path))
    assert [line["phase"] for line in updates(whole)[1:4]] == ["calibrating"] * 3
    assert updates(part) == updates(whole)


@pytest.mark.tier("all")
def test_a_mistake_is_one_line_and_status_2_from_two_processes(tmp_path: Path) -> None:
    paths = write_job(tmp_path)
    paths["data"] = tmp_path / "empty.txt"
    paths["data"].touch()
    arguments = job_arguments(paths, tmp_path / "out")
    launch = [sys.executable, "-m", "mols_ds.cli", "launch", *ports(), "-q", "--num_gpus", "2"]
    done = run(*launch, f"--config={paths['config']}", TRAIN, *arguments, cwd=tmp_path)
    assert done.status == 2
    assert done.stderr.splitlines() == [f"train.py: data {paths['data']}: it has no text"]
    assert "Traceback" not in done.stdout
