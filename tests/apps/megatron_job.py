"""A tiny job for train_megatron.py and functions that run on ranks."""

from __future__ import annotations

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


def whole_and_resumed(config: str, folder: str, middle: int) -> tuple[int, int, int]:
    """Runs on ranks: the job in one go, and from a copy of its checkpoint of step `middle` on. Returns both statuses
    and that of a run with other evaluations."""
    import torch.distributed as dist

    from mols_ds.apps.train_megatron.main import main

    whole, part = Path(folder) / "whole", Path(folder) / "part"
    first = main(["--config", config, "--out", str(whole)])
    if dist.get_rank() == 0:
        (part / "checkpoints").mkdir(parents=True)
        shutil.copytree(whole / "checkpoints" / f"step{middle}", part / "checkpoints" / f"step{middle}")
        (part / "checkpoints" / "latest").write_text(f"step{middle}", "utf-8")
        shutil.copy(whole / "metrics.jsonl", part)
    dist.barrier()
    second = main(["--config", config, "--out", str(part), "--resume"])
    never = ["--set", "run.eval_every=0", "--set", "run.save_every=0"]
    return first, second, main(["--config", config, "--out", str(Path(folder) / "blind"), *never])
