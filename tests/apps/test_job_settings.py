"""Settings of the jobs for logs, checkpoints and traces do what they say. Also: --snr-every and DeepSpeed's TensorBoard
in test_commands.py, --keep-last of train.py in test_export_run.py, the loop's part in unit/test_trainer.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.apps import megatron_job
from tests.apps.command import events_of, read_metrics, write_job
from tests.apps.finetuning import arguments, config_path, write_checkpoint, write_config
from tests.apps.mains import train
from tests.helpers.harness import run_ranks

pytestmark = [pytest.mark.jobs, pytest.mark.tier("all")]
TRACED = 2
SPARSE = ["--log-every", "3", "--eval-every", "0"]
KEPT = ["--save-every", "1", "--keep-last", "1", "--keep-every", "3"]
WANDB = """
import json, pathlib

def init(**given):
    folder = pathlib.Path(given["dir"])
    note("init", given, folder)
    return Run(folder)

def note(*entry):
    *what, folder = entry
    with (folder / "wandb.jsonl").open("a") as file:
        file.write(json.dumps(what) + "\\n")

class Run:
    def __init__(self, folder):
        self.folder = folder

    def log(self, values, step):
        note("log", step, values, self.folder)

    def finish(self):
        note("finish", self.folder)
"""
"""Stands in for the package wandb, which the tests do without: writes what it gets to OUT/wandb.jsonl."""


def logged(out: Path) -> list[int]:
    return [line["step"] for line in read_metrics(out) if "step" in line]


def saved(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("step*"))


def with_deepspeed(folder: str) -> dict[str, int]:
    """Runs on a rank: train.py and finetune.py. Returns the calls of the attention that train.py was given."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from mols_ds.apps.finetune import main as finetune

    calls: dict[str, int] = {"counted": 0}

    def counted(*args: Any, **more: Any) -> Any:
        calls["counted"] += 1
        return sdpa_attention_forward(*args, **more)

    AttentionInterface.register("counted", counted)
    base = Path(folder)
    paths = write_job(base, train_batch_size=2, mols={"enabled": False})
    more = ["--steps", "8", "--profile", str(TRACED), "--attention", "counted", *SPARSE]
    done = train(paths, base / "train", *more)
    assert done.status == 0, done.stderr
    write_checkpoint(base / "tiny")
    write_config(base, 2)
    argv = arguments(base, config_path(base, 2), base / "finetune", "lora", "--steps", "5", *KEPT, *SPARSE)
    assert finetune.main(argv) == 0
    return calls


def with_megatron(config: str, out: str, packages: str) -> int:
    """Runs on a rank: train_megatron.py."""
    from mols_ds.apps.train_megatron.main import main

    sys.path.insert(0, packages)
    try:
        return main(["--config", config, "--out", out])
    finally:
        sys.path.remove(packages)


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("settings")
    return folder, run_ranks(with_deepspeed, 1, str(folder), timeout=240)[0]


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron_settings")
    run = {
        "steps": 5,
        "log_every": 3,
        "eval_every": 0,
        "save_every": 1,
        "keep_last": 1,
        "keep_every": 3,
        "tensorboard_dir": str(folder / "board"),
        "wandb_project": "gradients",
        "wandb_exp_name": "first",
    }
    (folder / "packages").mkdir()
    (folder / "packages" / "wandb.py").write_text(WANDB, "utf-8")
    path = megatron_job.write_job(folder, run=run, mols=None)
    assert run_ranks(with_megatron, 1, str(path), str(folder / "out"), str(folder / "packages"), timeout=240) == [0]
    return folder


def test_profile_traces_the_steps_asked_for(deepspeed: tuple[Path, dict[str, int]]) -> None:
    trace = json.loads((deepspeed[0] / "train" / "profile" / "trace.json").read_text("utf-8"))
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert len([name for name in names if name.startswith("ProfilerStep#")]) == TRACED
    assert "aten::mm" in names


def test_attention_is_the_implementation_of_that_name(deepspeed: tuple[Path, dict[str, int]]) -> None:
    assert deepspeed[1]["counted"] >= 8


def test_lines_are_logged_as_often_as_asked_for(deepspeed: tuple[Path, dict[str, int]], megatron: Path) -> None:
    assert logged(deepspeed[0] / "train") == [3, 6, 8]
    assert logged(deepspeed[0] / "finetune") == logged(megatron / "out") == [3, 5]


def test_the_newest_checkpoint_and_those_of_every_third_step_stay(
    deepspeed: tuple[Path, dict[str, int]], megatron: Path
) -> None:
    assert saved(deepspeed[0] / "finetune") == saved(megatron / "out") == ["step3", "step5"]


def test_tensorboard_and_wandb_get_the_values_of_train_megatron(megatron: Path) -> None:
    lines = [line for line in read_metrics(megatron / "out") if "step" in line]
    board = events_of(megatron / "board")
    for name in ("loss", "lr", "grad_norm"):
        assert board[name] == pytest.approx([line[name] for line in lines])
    first, *logs, last = [
        json.loads(line) for line in (megatron / "out" / "wandb.jsonl").read_text("utf-8").splitlines()
    ]
    kind, given = first
    assert kind == "init" and (given["project"], given["name"]) == ("gradients", "first")
    assert given["config"]["run"]["steps"] == 5
    assert [(kind, step) for kind, step, _ in logs] == [("log", 3), ("log", 5)]
    assert [values["loss"] for *_, values in logs] == [line["loss"] for line in lines]
    assert last == ["finish"]
