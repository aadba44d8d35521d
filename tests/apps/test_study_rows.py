"""A tiny study that keeps its results as rows: killed, continued, repeated, and equal to train.py bit for bit."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.apps.command import TINY_MODEL, run
from tests.helpers.harness import ROOT

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(700), pytest.mark.tier("all")]
STEPS, LENGTH = 12, 32
STUDY: dict[str, Any] = {
    "name": "tiny",
    "models": {"one": TINY_MODEL, "two": TINY_MODEL},
    "changes": {"two": {"settings_of": "one", "best": 1, "budget": {"steps": 2 * STEPS}}},
    "rows": "rows.jsonl",
    "data": {"source": str(ROOT / "mols_ds" / "core"), "eval_share": 0.1},
    "batch": {"sequences": 4, "length": LENGTH},
    "budget": {"steps": STEPS},
    "lr": [1e-2],
    "tune_seeds": [0],
    "seeds": [1, 2],
    "primary": ["mols", "constant"],
    "secondary": ["mols", "adam"],
    "searched": "search",
    "evaluation": {"sequences": 8, "every": 6},
    "costs": False,
    "arms": {
        "adam": {"params": {"torch_adam": True}},
        "constant": {"params": {"torch_adam": True}, "mols": {"fixed_alphas": {"embedding": 4.0}}},
        "mols": {"params": {"torch_adam": True}, "mols": {"samples": 4}},
        "search": {"params": {"torch_adam": True}, "mols": {}, "search": {"start": "constant", "runs": 2}},
    },
}
RUNS = 3 * 3 + 2 + 2 + 2 * 2  # 3 arms with 3 runs, the search, its evaluation, two arms on the other model


def rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / "rows.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study killed after two runs, and finished by the same command with another folder of results."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY), "utf-8")
    command = [sys.executable, "-m", "mols_ds", "compare", folder / "study.yaml", "--jobs", "1", "--out", folder / "a"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while len(rows(folder)) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run(sys.executable, "-m", "mols_ds", "compare", folder / "study.yaml", "--out", folder / "b", cwd=ROOT)
    assert done.status == 0, done.stderr
    return folder


def test_a_killed_study_goes_on_from_its_rows_in_another_folder(folder: Path) -> None:
    found = rows(folder)
    assert len(found) == len({row["key"] for row in found}) == RUNS
    assert not list(folder.glob("*/runs")), "rows replace the files of runs"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    for row in found:
        assert row["made"]["commit"].removesuffix("-dirty") == commit.stdout.strip()
        assert row["steps"] == STEPS * (1 + (row["model"] == "two"))
    assert {row["arm"] for row in found if row["model"] == "two"} > {"adam"}
    text = (folder / "b" / "report.md").read_text("utf-8")
    assert "## The questions of this study" in text and "## Share of the searched gain" in text
    assert "not complete" not in text


def test_repeated_runs_give_the_same_bits_and_a_changed_row_is_found_out(folder: Path) -> None:
    command = (sys.executable, "-m", "mols_ds", "compare", folder / "study.yaml", "--out", folder / "b")
    done = run(*command, "--rerun", "3", cwd=ROOT)
    assert done.status == 0 and done.stdout.count("the same bits") == 3, (done.stdout, done.stderr)
    changed = folder / "changed"
    changed.mkdir()
    (changed / "study.yaml").write_text(
        yaml.safe_dump({**STUDY, "models": {"one": TINY_MODEL}, "changes": {}}), "utf-8"
    )
    row = next(row for row in rows(folder) if row["arm"] == "mols" and row["seed"] == 1)
    row["val_loss"] += 1e-9
    (changed / "rows.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    done = run(*command[:4], changed / "study.yaml", "--out", changed / "out", "--rerun", "3", cwd=ROOT)
    assert done.status == 1 and "one-mols-lr0.01-s1 was not repeated: val_loss" in done.stderr


def test_a_run_has_the_bits_of_train_py(folder: Path, tmp_path: Path) -> None:
    """The tuning run of `adam`, whose seed is also that of the tokenizer and of the held-out documents."""
    (tmp_path / "model.json").write_text(json.dumps(TINY_MODEL), "utf-8")
    config = {
        "train_batch_size": 4,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 0},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-2}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    data = ["--data", ROOT / "mols_ds" / "core", "--eval-share", "0.1", "--eval-sequences", "8", "--eval-every", "6"]
    done = run(
        sys.executable, ROOT / "train.py", "--deepspeed_config", tmp_path / "config.json", "--model",
        tmp_path / "model.json", "--steps", str(STEPS), "--seq-len", str(LENGTH), *data, "--out", tmp_path / "out",
        cwd=ROOT,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text("utf-8").splitlines()]
    (row,) = [row for row in rows(folder) if (row["arm"], row["seed"]) == ("adam", 0)]
    assert row["val_loss"] == metrics[-1]["val_loss"]
    assert row["curve"]["loss"] == [line["loss"] for line in metrics if "loss" in line]


FAULTS = """
import resource, torch
weight = torch.zeros(4096, 32, requires_grad=True)
for step in range(12):
    if step == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.nn.functional.cross_entropy(torch.ones(2048, 32) @ weight.T, torch.zeros(2048, dtype=torch.long)).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_freed_memory_stays_with_a_process_of_a_study() -> None:
    """Page faults of steps 5 to 12 of a head with four tensors of 32 MiB, so 8 x 4 x 8,192 without these settings. With
    them, a tensor gets new pages now and then, where freed ones do not fit."""
    from mols_ds.apps.study.workers import KEEP_FREED

    def faults(more: dict[str, str]) -> int:
        environment = {name: value for name, value in os.environ.items() if name not in KEEP_FREED}
        command = [sys.executable, "-c", FAULTS]
        ran = subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, check=True)
        return int(ran.stdout)

    assert 5 * faults(KEEP_FREED) < faults({})
