"""The benchmarks run as a user would run them, at a size that takes seconds."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import RANK_ENVIRONMENT, ROOT

pytestmark = pytest.mark.jobs
SECONDS = 150  # a bound for a busy machine; alone it takes about 15 seconds
SOURCE = Path(asyncio.__file__).parent  # a small part of the default text


def convergence(*arguments: str) -> str:
    """Standard output of `benchmarks/convergence.py`; kills it with its workers when the time is up."""
    command = [sys.executable, "benchmarks/convergence.py", "--smoke", "--data", str(SOURCE), *arguments]
    environment = {**os.environ, **RANK_ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, errors
    return output


def test_convergence_trains_each_run_once_and_compares_in_pairs(tmp_path: Path) -> None:
    first = convergence("--out", str(tmp_path))
    runs = sorted((tmp_path / "runs").glob("*.json"))
    assert len(runs) == 6  # two arms, two rates with the first seed, the second seed at each arm's best rate
    assert "| adam |" in first and "| damping |" in first
    assert (tmp_path / "convergence.md").read_text("utf-8") in first

    content = json.loads((tmp_path / "convergence.json").read_text("utf-8"))
    adam, mols = content["arms"]
    assert adam["difference"] is None and mols["difference"]["pairs"] == 2
    pairs = [mols["losses"][seed] - adam["losses"][seed] for seed in ("0", "1")]
    assert mols["difference"]["mean"] == pytest.approx(sum(pairs) / 2)
    # The 97.5 % quantile of Student's t with one degree of freedom; the standard error of two is half their distance.
    assert mols["difference"]["half"] == pytest.approx(12.7062 * abs(pairs[0] - pairs[1]) / 2, rel=1e-4)
    assert all(math.isfinite(row["mean"]) and row["mean"] < math.log(320) for row in content["arms"])

    before = {path: path.stat().st_mtime_ns for path in runs}
    assert convergence("--out", str(tmp_path)).endswith(first[first.index("Final") :])
    assert {path: path.stat().st_mtime_ns for path in runs} == before, "a finished run was trained again"
