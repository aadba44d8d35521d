"""A DeepSpeed config with changes, and what the doctor finds in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mols_ds.apps.doctor.findings import Findings

BASE: dict[str, Any] = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": False},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "mols": {"start": 2, "samples": 8, "ramp_end": 20},
}


def only(findings: Findings, name: str, level: str | None = None) -> list[Any]:
    return [f for f in findings.items if f.name == name and level in (None, f.level)]


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    config = json.loads(json.dumps(BASE))
    for key, value in changes.items():
        config[key] = {**config["mols"], **value} if key == "mols" else value
    return dict(config)


def examined(config: dict[str, Any], folder: Path, **options: Any) -> Findings:
    from mols_ds.apps.doctor.deepspeed_config import check_config

    path = folder / "ds.json"
    path.write_text(json.dumps(config), "utf-8")
    findings = Findings()
    check_config(findings, str(path), **{"model": None, "steps": 100, "world": 2, **options})
    return findings
