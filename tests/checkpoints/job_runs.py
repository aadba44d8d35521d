"""Run train.py and train_megatron.py on the ranks of the harness: interrupt them, or continue from a folder.

Everything is named by relative paths, from a work folder that the ranks share.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.checkpoints.comparing import FIXTURES, read
from tests.helpers.harness import ROOT, draw_nothing

START, OUT = "start", "out"
TIMES = ("step_seconds", "eval_seconds")
MODELS = ("LlamaForCausalLM", "GPTModel")

draw_nothing()


@contextlib.contextmanager
def noted_passes(stop_at: int | None) -> Iterator[list[float]]:
    """Draw a random number in each training forward pass, as dropout does, and yield the list of them.

    No dropout: its masks differ between processors, but single numbers of torch's generator do not. In pass number
    `stop_at` this process gets SIGTERM, on which both programs save and end.
    """
    drawn: list[float] = []

    def draw(module: torch.nn.Module, inputs: Any) -> None:
        if type(module).__name__ in MODELS and module.training:
            drawn.append(float(torch.rand(1)))
            if len(drawn) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(draw)
    try:
        yield drawn
    finally:
        hook.remove()


def call(script: str, arguments: list[str]) -> int:
    """Run a program in this process, as `python SCRIPT ARGUMENTS`; its exit status."""
    former = sys.argv
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = former
    return 0


@contextlib.contextmanager
def work_folder(source: str, name: str) -> Iterator[None]:
    """Work in a copy of `source`, the same for all ranks. Collective."""
    if dist.get_rank() == 0:
        shutil.copytree(source, name)
    dist.barrier()
    former = os.getcwd()
    os.chdir(name)
    try:
        yield
    finally:
        dist.barrier()
        os.chdir(former)


def metrics() -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in Path(OUT, "metrics.jsonl").read_text("utf-8").splitlines()]


def keys_of(lines: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Key -> type in each kind of line: a step, a step with an evaluation, the end."""
    found: dict[str, dict[str, str]] = {}
    for line in lines:
        kind = "final" if line.get("final") else "evaluated" if "val_loss" in line else "step"
        found.setdefault(kind, {}).update({key: type(value).__name__ for key, value in line.items()})
    return found


def interrupted(folder: str, settings_json: str) -> list[float]:
    """Run the program of the settings from the first step in `folder`, a copy of which is left there as it ends."""
    settings = json.loads(settings_json)
    with work_folder(folder, f"writing-{settings['script']}"):
        with noted_passes(settings["stop_at_pass"]) as drawn:
            status = call(settings["script"], settings["arguments"])
        assert status == 0 and not metrics()[-1].get("final"), (status, metrics())
        if dist.get_rank() == 0:
            shutil.copytree(OUT, Path(folder, OUT))
    return drawn


def continued(name: str) -> dict[str, Any]:
    """Continue from a copy of a fixture with --resume; returns this rank's part of `expected.json`."""
    settings = read(name, "settings.json")
    with work_folder(str(FIXTURES / name / START), name):
        before = len(metrics())
        dist.barrier()
        with noted_passes(None) as drawn:
            status = call(settings["script"], [*settings["arguments"], "--resume"])
        dist.barrier()
        report = json.loads(Path(OUT, "mols_report", "mols_report.json").read_text("utf-8"))
        lines = [{key: value for key, value in line.items() if key not in TIMES} for line in metrics()]
        found = {"status": status, "lines_before": before, "metrics": lines, "report": report}
        found["keys"] = keys_of(metrics()[before:])
        latest = Path(OUT, "checkpoints", "latest").read_text("utf-8")
    drawn_by: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(drawn_by, drawn)
    return {**found, "latest": latest, "drawn": drawn_by}


def finetuned() -> dict[str, dict[str, str]]:
    """Run finetune.py on a tiny checkpoint; returns the keys of its metrics.jsonl."""
    from tests.apps.finetuning import CONFIG, DATA, write_checkpoint

    if dist.get_rank() == 0:
        inputs = Path("finetune-inputs")
        inputs.mkdir()
        write_checkpoint(inputs / "tiny")
        (inputs / "ds.json").write_text(json.dumps({**CONFIG, "zero_optimization": {"stage": 2}}), "utf-8")
    arguments = ["--deepspeed_config", "ds.json", "--model", "tiny", "--data", str(DATA), "--out", OUT]
    arguments += ["--method", "full", "--steps", "4", "--eval-share", "0.2", "--eval-every", "2"]
    with work_folder("finetune-inputs", "finetune"):
        status = call("finetune.py", arguments)
        dist.barrier()
        assert status == 0
        return keys_of(metrics())


def job(name: str) -> Any:
    """One of the cases: a fixture to continue from, or "finetune"."""
    return finetuned() if name == "finetune" else continued(name)
