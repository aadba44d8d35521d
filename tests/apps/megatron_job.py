"""A tiny job for train_megatron.py and functions that run on ranks."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.apps.command import ROOT, write_text

TRAIN = ROOT / "train_megatron.py"
STEPS = 6
TINY: dict[str, Any] = {
    "model": {
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_hidden_size": 32,
        "num_attention_heads": 2,
        "vocab_size": 300,
        "vocab_multiple": 4,
    },
    "optimizer": {"lr": 1e-2},
    "batch": {"micro": 1, "global": 4},
    "run": {"steps": STEPS, "seq_len": 32, "eval_sequences": 6},
    "mols": {"start": 1, "samples": 4, "mode": "probe", "ramp_end": 4},
}


def write_job(folder: Path, **sections: Any) -> Path:
    """A config file and its text in `folder`; `sections` are laid over the tiny job's."""
    data = {"source": str(write_text(folder / "text.jsonl")), "eval_share": 0.2}
    content = {"data": data, **TINY}
    for name, section in sections.items():
        both = isinstance(section, dict) and isinstance(content.get(name), dict)
        content[name] = {**content[name], **section} if both else section
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(content), "utf-8")
    return path


def whole_and_resumed(config: str, folder: str, middle: int) -> tuple[int, ...]:
    """Runs on ranks: the job in one go, and from a copy of its checkpoint of step `middle` on. Returns both statuses,
    that of a run with other evaluations, and those of the resumed run at half the rate and with another seed."""
    import torch.distributed as dist

    from mols_ds.apps.train_megatron.main import main

    whole, part, slower = (Path(folder) / name for name in ("whole", "part", "slower"))
    first = main(["--config", config, "--out", str(whole)])
    for copy in (part, slower):
        if dist.get_rank() == 0:
            (copy / "checkpoints").mkdir(parents=True)
            shutil.copytree(whole / "checkpoints" / f"step{middle}", copy / "checkpoints" / f"step{middle}")
            (copy / "checkpoints" / "latest").write_text(f"step{middle}", "utf-8")
            shutil.copy(whole / "metrics.jsonl", copy)
            shutil.copy(whole / "run.json", copy)
    dist.barrier()
    second = main(["--config", config, "--out", str(part), "--resume"])
    never = ["--set", "run.eval_every=0", "--set", "run.save_every=0"]
    third = main(["--config", config, "--out", str(Path(folder) / "blind"), *never])
    resumed = ["--config", config, "--out", str(slower), "--resume"]
    refused = main([*resumed, "--set", "run.seed=7"])
    return first, second, third, main([*resumed, "--set", "optimizer.lr=5e-3"]), refused


def extended(config: str, folder: str) -> tuple[list[int], str]:
    """On one rank: six steps at once; four, then six; and 200, which take several passes over the text, after six.
    Returns the statuses, and what the last run prints to stderr."""
    from mols_ds.apps.train_megatron.main import main

    def call(name: str, steps: int, *more: str) -> int:
        return main(["--config", config, "--out", str(Path(folder) / name), "--set", f"run.steps={steps}", *more])

    found = [call("whole", 6), call("part", 4), call("part", 6, "--resume")]
    with contextlib.redirect_stderr(io.StringIO()) as text:
        found.append(call("part", 200, "--resume"))
    return [*found, call("part", 6, "--resume")], text.getvalue()
