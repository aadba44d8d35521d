"""Locks in torch's cache of extensions: old ones are named, those of a compilation under way are not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mols_ds.apps.doctor.findings import Findings
from mols_ds.apps.doctor.machine import _compile_locks
from mols_ds.core.compile_locks import lock_problem, stale_locks


def lock(folder: Path, age: float) -> Path:
    folder.mkdir(parents=True)
    path = folder / "lock"
    path.write_text("")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_old_locks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert stale_locks() == [] and lock_problem([]) is None
    lock(tmp_path / "py311_cpu" / "fused_adam", 5.0)
    findings = Findings()
    _compile_locks(findings)
    assert [item.level for item in findings.items] == ["ok"]
    second = lock(tmp_path / "deepspeed_shm_comm", 4000.0)
    first = lock(tmp_path / "py311_cpu" / "deepspeed_shm_comm", 8000.0)
    assert stale_locks() == [first, second]
    findings = Findings()
    _compile_locks(findings)
    (item,) = findings.items
    assert item.level == "warning" and str(first) in item.found and f"rm {first} {second}" in item.fix


def test_a_cache_that_is_not_there(tmp_path: Path) -> None:
    assert stale_locks(tmp_path / "absent") == []
