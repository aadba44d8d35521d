"""torchtitan's own Trainer with the lines of docs/torch.md, on two CPU ranks: where TORCHTITAN names a Python with it.

python -m venv FOLDER; FOLDER/bin/pip install torchtitan triton
TORCHTITAN=FOLDER/bin/python python -m pytest tests/integrations/test_torchtitan.py
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.apps.command import run

PYTHON = os.environ.get("TORCHTITAN", "")
SCRIPT = Path(__file__).with_name("torchtitan_run.py")


@pytest.mark.distributed
@pytest.mark.tier("all")
@pytest.mark.timeout(900)
@pytest.mark.skipif(not PYTHON, reason="TORCHTITAN names no Python with torchtitan")
def test_its_trainer_measures_and_continues_inside_of_a_calibration(tmp_path: Path) -> None:
    def train(name: str) -> Any:
        ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
        done = run(PYTHON, *ranks, SCRIPT, f"{name}.json", name, cwd=tmp_path)
        assert done.status == 0, done.stderr[-3000:]
        return json.loads((tmp_path / f"{name}.json").read_text("utf-8"))

    whole = train("whole")
    assert whole["kinds"] == ["DTensor"] and whole["phase"] == "fixed" and whole["steps"] == 12
    assert whole["elements"]["qk"] == whole["elements"]["vo"]  # rows of wqkv, and wo
    assert len(set(whole["alphas"].values())) > 2
    shutil.rmtree(tmp_path / "out/checkpoint/step-12")
    assert train("resumed") == whole
