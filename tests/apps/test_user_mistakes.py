"""Each mistake of a user is one line and status 2, from the whole command."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mols_ds import cli
from mols_ds.apps import train as job
from mols_ds.apps.launch import deepspeed_cli
from tests.apps.command import ROOT, TINY_MODEL, TRAIN, job_arguments, read_metrics, run, write_job
from tests.apps.mains import one_line

MEGATRON = ROOT / "configs" / "megatron" / "tiny.yaml"


def adam(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, **params}}}


# Changed keys of the DeepSpeed config and of the model file, and what the line says
KEYS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "top level": ({"gradient_cliping": 1.0}, {}, 'unknown key "gradient_cliping"; did you mean "gradient_clipping"?'),
    "section": ({"zero_optimisation": {}}, {}, 'unknown key "zero_optimisation"; did you mean "zero_optimization"?'),
    "parameter": (adam(weight_decya=0.1), {}, '"optimizer.params.weight_decya" of AdamW: unknown key; did you mean'),
    "value": (adam(betas=[0.9, 2]), {}, '"optimizer.params.betas" of AdamW is [0.9, 2]: give two numbers in [0, 1)'),
    "word": (adam(lr="fast"), {}, "\"optimizer.params.lr\" of AdamW is 'fast': give a number >= 0"),
    "library": (
        {"optimizer": {"type": "Lion", "params": {"lr": 1e-3, "betaz": [0.9, 0.9]}}},
        {},
        "has no 'betaz' (did you mean \"betas\"?)",
    ),
    "model": ({}, {"hiden_size": 32}, '"hiden_size" is no setting of LlamaConfig; did you mean "hidden_size"?'),
    "validator": ({}, {"hidden_size": 15}, "hidden size (15) is not a multiple of the number of attention heads (2)"),
    "type": ({}, {"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str (value: 'wide')"),
}


def changed_job(name: str, folder: Path) -> dict[str, Path]:
    config, model, _ = KEYS[name]
    paths = write_job(folder, **config)
    paths["model"].write_text(json.dumps({**TINY_MODEL, **model}), "utf-8")
    return paths


@pytest.mark.parametrize("name", KEYS)
def test_a_misspelt_key_is_found_before_processes_start(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By DeepSpeed's launcher, by `mols-ds train`, and by a rank that another launcher has started."""
    paths = changed_job(name, tmp_path)
    arguments = job_arguments(paths, tmp_path / "out")

    def no_process(*_: object, **__: object) -> None:
        pytest.fail("a process was started")

    monkeypatch.setattr(subprocess.Popen, "__init__", no_process)
    assert deepspeed_cli.main(["--num_gpus", "2", "--config", str(paths["config"]), str(TRAIN), *arguments]) == 2
    whole = [*arguments, "--config", str(paths["config"])]
    assert cli.main(["train", "--nproc", "2", *whole]) == 2
    assert job.main(whole) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["deepspeed", "mols-ds train", "train.py"], lines
    assert all(KEYS[name][2] in line for line in lines), lines


@pytest.mark.tier("all")
def test_the_launcher_ends_with_the_one_line(tmp_path: Path) -> None:
    paths = changed_job("top level", tmp_path)
    launch = ["deepspeed", "--num_gpus", "2", "--config", paths["config"], TRAIN]
    done = run(*launch, *job_arguments(paths, tmp_path / "out"), cwd=tmp_path)
    assert one_line(done).startswith(f"deepspeed: DeepSpeed config {paths['config']}: unknown key") and not done.stdout


def test_the_config_of_the_other_script_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mols_ds.apps.train_megatron import main as megatron

    paths = write_job(tmp_path)
    assert job.main(["--config", str(MEGATRON), *job_arguments(paths, tmp_path / "out")]) == 2
    assert megatron.main(["--config", str(paths["config"]), "--out", str(tmp_path / "out")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"train.py: DeepSpeed config {MEGATRON}: it is a config of train_megatron.py"
    assert (
        second == f"train_megatron.py: config {paths['config']}: it is a DeepSpeed config, for train.py and finetune.py"
    )


def plain(folder: Path) -> dict[str, Path]:
    return write_job(folder, train_batch_size=2, mols={"enabled": False})


def train(paths: dict[str, Path], out: Path, *more: str) -> Any:
    config = ["--deepspeed_config", str(paths["config"])]
    return run(sys.executable, TRAIN, *config, *job_arguments(paths, out, *more), cwd=out.parent)


@pytest.mark.tier("all")
def test_rows_without_text_are_skipped_and_counted(tmp_path: Path) -> None:
    paths = plain(tmp_path)
    rows = paths["data"].read_text("utf-8").splitlines()
    none = [json.dumps({"text": text}) for text in (None, None, "  ")]
    (tmp_path / "holes.jsonl").write_text("\n".join([*none, *rows, *none]), "utf-8")
    whole = train(paths, tmp_path / "whole", "--steps", "2")
    holes = train({**paths, "data": tmp_path / "holes.jsonl"}, tmp_path / "holes", "--steps", "2")
    assert whole.status == holes.status == 0, holes.stderr
    warning = f"warning: data {tmp_path / 'holes.jsonl'}: rows were skipped (2 empty, 4 null)"
    assert holes.stderr.splitlines() == [warning] and not whole.stderr
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)[:-1]] for name in ("whole", "holes")]
    assert losses[0] == losses[1]


@pytest.mark.tier("all")
def test_a_taken_port(tmp_path: Path) -> None:
    """One process takes a free port; of several, rank 0 names the port."""
    paths = plain(tmp_path)
    with socket.socket() as default, socket.socket() as other:
        with contextlib.suppress(OSError):  # somebody else has it
            default.bind(("127.0.0.1", 29500))
            default.listen()
        alone = train(paths, tmp_path / "alone", "--steps", "1")
        assert alone.status == 0, alone.stderr
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        launch = ["deepspeed", "-q", "--master_port", str(port), "--num_gpus", "2", "--config", paths["config"], TRAIN]
        done = run(*launch, *job_arguments(paths, tmp_path / "two", "--steps", "1"), cwd=tmp_path)
    line = one_line(done)
    assert line.startswith(f"train.py: port {port} of this machine is taken, perhaps by another run: give another one")


SMALL = 'mount -t tmpfs -o size={size}k none "$0" && exec "$@"'


def on_small_disk(folder: Path, kilobytes: int, *command: str | Path) -> Any:
    """Run a command with a small file system of its own at `folder`."""
    folder.mkdir()
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("no user namespaces here")
    return run("unshare", "-rm", "bash", "-c", SMALL.format(size=kilobytes), folder, *command, cwd=folder.parent)


@pytest.mark.tier("all")
@pytest.mark.parametrize(
    ("kilobytes", "message"), [(48, "cannot be saved in {out}/checkpoints: no space left on this disk")]
)
def test_a_full_disk(kilobytes: int, message: str, tmp_path: Path) -> None:
    paths = plain(tmp_path)
    ready = train(paths, tmp_path / "ready", "--steps", "1")
    assert ready.status == 0, ready.stderr
    disk = tmp_path / "disk"
    arguments = [*job_arguments(paths, disk / "out", "--steps", "2"), "--cache-dir", str(tmp_path / "cache")]
    done = on_small_disk(disk, 128, sys.executable, TRAIN, "--deepspeed_config", paths["config"], *arguments)
    assert f"cannot be saved in {disk / 'out'}/checkpoints: no space left on this disk" in one_line(done)
    tiny = on_small_disk(tmp_path / "tiny", 8, sys.executable, TRAIN, "--deepspeed_config", paths["config"],
                         *job_arguments(paths, tmp_path / "tiny" / "out"))  # fmt: skip
    assert "No space left on device" in one_line(tiny)
