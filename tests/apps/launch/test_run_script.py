"""A stock script that the shim starts has MoLS: `mols_ds/apps/launch/run_script.py`, by the real launcher and alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mols_ds.apps.launch.deepspeed_cli import RUN_SCRIPT
from tests.apps.command import ROOT, SHIM, run
from tests.helpers.ports import free_port

SCRIPT = """
import argparse, importlib.util, json, os, sys
assert importlib.util.find_spec("deepspeed")  # as transformers.is_deepspeed_available looks for it
late = "torch" not in sys.modules and "deepspeed" not in sys.modules
import helper_beside_the_script
import deepspeed, torch
from deepspeed import initialize
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
deepspeed.add_config_arguments(parser)
args = parser.parse_args()
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = torch.nn.ModuleDict({"v_proj": torch.nn.Linear(8, 8)})
model = Model()
engine, *_ = initialize(args=args, model=model, model_parameters=model.parameters())
import __main__
print("SEEN", json.dumps({
    "phase": engine.mols.phase if hasattr(engine, "mols") else "stock", "late": late, "argv": sys.argv,
    "main": __main__.Model is Model, "file": __file__, "rank": args.local_rank}))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "mols": {"start": 1, "samples": 4, "ramp_end": 8},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project of the user's: a script, a module beside it and a config."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "script.py").write_text(SCRIPT, "utf-8")
    (project / "helper_beside_the_script.py").write_text("", "utf-8")
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG), "utf-8")
    return tmp_path


def seen_in(stdout: str) -> dict[str, Any]:
    (line,) = [line for line in stdout.splitlines() if "SEEN " in line]
    seen: dict[str, Any] = json.loads(line.partition("SEEN ")[2])
    return seen


def run_alone(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    alone["MASTER_PORT"] = str(free_port())
    environment = {**os.environ, **alone, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, RUN_SCRIPT, *argv]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.jobs
@pytest.mark.timeout(660)
def test_the_shim_turns_mols_on_for_a_stock_script(folder: Path) -> None:
    launch = [SHIM, "--master_port", str(free_port()), "--num_accelerators", "1", "--config", "ds.json"]
    done = run(*launch, "project/script.py", cwd=folder, timeout=600)  # stock DeepSpeed compiles a kernel at first
    assert done.status == 0, done.stderr
    config = ["--deepspeed", "--deepspeed_config", str(folder / "ds.json")]
    assert seen_in(done.stdout) == {
        "phase": "waiting",
        "late": True,
        "argv": ["project/script.py", "--local_rank=0", *config],
        "main": True,
        "file": "project/script.py",
        "rank": 0,
    }


@pytest.mark.jobs
@pytest.mark.tier("all")
def test_a_module_runs_as_python_runs_it(folder: Path) -> None:
    more = ["--deepspeed_config", str(folder / "ds.json")]
    done = run_alone("--local_rank=0", "-m", "script", *more, cwd=folder / "project")
    assert done.returncode == 0, done.stderr
    seen = seen_in(done.stdout)
    assert seen["phase"] == "waiting" and seen["argv"][1:] == ["--local_rank=0", *more]
    assert Path(seen["argv"][0]).name == "script.py"


@pytest.mark.jobs
@pytest.mark.tier("all")
def test_a_section_that_no_engine_got_is_said(folder: Path) -> None:
    """A script that ignores the launcher's config and builds its own engine."""
    own = "import deepspeed, torch\nmodel = torch.nn.Linear(4, 4)\n"
    own += "deepspeed.initialize(model=model, model_parameters=model.parameters(), config=" + repr(
        {key: value for key, value in CONFIG.items() if key != "mols"}
    )
    scripts = {"plain": "import sys; sys.exit(0)", "own": own + ")", "failed": "import sys; sys.exit(3)"}
    said = {}
    for name, text in scripts.items():
        (folder / f"{name}.py").write_text(text, "utf-8")
        config = ["--deepspeed_config=ds.json"] if name == "own" else ["--deepspeed_config", "ds.json"]
        done = run_alone(f"{name}.py", "--deepspeed", *config, cwd=folder)
        said[name] = done.returncode, [line for line in done.stderr.splitlines() if "was left out" in line]
    line = 'deepspeed: the "mols" section of ds.json was left out: the script gave it to no deepspeed.initialize'
    assert said == {"plain": (0, [line]), "own": (0, [line]), "failed": (3, [])}


def test_a_script_without_deepspeed_loads_nothing(folder: Path) -> None:
    script = "import sys; print(sorted({'torch', 'deepspeed', 'pydantic'} & set(sys.modules))); sys.exit(7)"
    (folder / "other.py").write_text(script, "utf-8")
    done = run_alone("other.py", cwd=folder)
    assert (done.returncode, done.stdout) == (7, "[]\n")
