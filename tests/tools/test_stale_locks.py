"""pytest refuses to start beside a stale lock in torch's cache of extensions: every launch would hang on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.harness import ROOT


@pytest.mark.tier("all")
def test_pytest_refuses_to_start(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", __file__]
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout
    assert f"{lock}: left by a killed compilation" in done.stderr and f"remove: rm {lock}" in done.stderr
