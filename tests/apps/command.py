"""Run whole commands in their own session, killed together after a timeout; and a tiny job to run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.at_exit.sitecustomize import LEFT

ROOT = Path(__file__).resolve().parent.parent.parent
SHIM = ROOT / "launch" / "deepspeed"
TRAIN = ROOT / "train.py"
TIME_LIMIT = 240.0  # several start-ups of torch and DeepSpeed on a machine that runs other work

TINY_MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
TINY_CONFIG: dict[str, Any] = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": False},
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "mols": {"start": 1, "samples": 4, "mode": "probe", "ramp_end": 4},
}


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    status: int
    stdout: str
    stderr: str


def run(*argv: str | Path, cwd: Path, timeout: float = TIME_LIMIT) -> Done:
    """Runs a command with this repository's launch/ and this Python's scripts first on PATH.

    A command that succeeds must not leave a process group: see tests/helpers/at_exit.
    """
    places = [str(ROOT / "launch"), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    more = [str(ROOT / "tests/helpers/at_exit"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    packages = os.pathsep.join(more).rstrip(os.pathsep)
    environment = {**os.environ, "PATH": os.pathsep.join(places), "PYTHONPATH": packages}
    process = subprocess.Popen(
        [str(arg) for arg in argv],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(f"{argv} took over {timeout:.0f} s\n{stdout[-3000:]}\n{stderr[-3000:]}") from None
    assert process.returncode != 0 or LEFT not in stderr, f"{argv}: {LEFT}"
    return Done(process.returncode, stdout, stderr.replace(f"{LEFT}\n", ""))


def write_text(path: Path, documents: int = 60) -> Path:
    """A JSONL file of short documents that differ from each other."""
    rows = [{"text": f"document {n} " + " ".join(f"word{(n * k) % 97}" for k in range(40))} for n in range(documents)]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return path


def write_job(folder: Path, config: dict[str, Any] | None = None, **changes: Any) -> dict[str, Path]:
    """A tiny model file, config and text in `folder`; `changes` replace top-level keys of the config."""
    paths = {"model": folder / "tiny.json", "config": folder / "ds.json", "data": write_text(folder / "text.jsonl")}
    paths["model"].write_text(json.dumps(TINY_MODEL), "utf-8")
    paths["config"].write_text(json.dumps({**(config or TINY_CONFIG), **changes}), "utf-8")
    return paths


def job_arguments(paths: dict[str, Path], out: Path, *more: str) -> list[str]:
    """Arguments of train.py for the tiny job."""
    fixed = ["--model", str(paths["model"]), "--data", str(paths["data"]), "--out", str(out)]
    return [*fixed, "--seq-len", "32", "--eval-sequences", "6", "--eval-share", "0.2", *more]


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of OUT/metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


def events_of(folder: Path) -> dict[str, list[float]]:
    """The values of TensorBoard's event files in a folder, by name, in the order of the steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[float]] = {}
    for place in sorted({path.parent for path in folder.rglob("events.*")}):
        reader = EventAccumulator(str(place))
        reader.Reload()
        for name in reader.Tags()["scalars"]:
            found.setdefault(name, []).extend(event.value for event in reader.Scalars(name))
    return found
