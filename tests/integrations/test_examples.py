"""Every example runs as its first lines say, and is short."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.apps.command import ROOT, Done, run

pytestmark = [pytest.mark.jobs, pytest.mark.tier("all")]

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "tiny.py")
NEEDS = {"sft.py": ("trl", "peft"), "accelerate_loop.py": ("accelerate",), "lightning_module.py": ("lightning",)}
ON_CPU = """
import runpy, sys, torch
from lightning.pytorch.accelerators import CPUAccelerator
import lightning.pytorch.strategies.deepspeed as strategies
from lightning.pytorch.strategies import DeepSpeedStrategy
strategies._validate_device_index_selection = lambda devices: None
CPUAccelerator.auto_device_count = staticmethod(lambda: 2)
DeepSpeedStrategy.setup_environment = super(DeepSpeedStrategy, DeepSpeedStrategy).setup_environment
DeepSpeedStrategy.root_device = property(lambda self: torch.device("cpu", 0))
sys.path.insert(0, {folder!r})
runpy.run_path({script!r}, run_name="__main__")
"""
"""Lightning's checks of a CPU, put aside as in lightning_fit.py; `devices="auto"` is one device on a CPU."""


def start(name: str, cwd: Path) -> Done:
    script = EXAMPLES / name
    if name == "lightning_module.py":
        (cwd / "on_cpu.py").write_text(ON_CPU.format(folder=str(EXAMPLES), script=str(script)), "utf-8")
        script = cwd / "on_cpu.py"
    return run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, cwd=cwd)


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_ends_with_alphas(name: str, tmp_path: Path) -> None:
    missing = [package for package in NEEDS.get(name, ()) if find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    done = start(name, tmp_path)
    assert done.status == 0, done.stderr[-3000:]
    assert any(line.startswith("fixed {") and "'qk'" in line for line in done.stdout.splitlines()), done.stdout[-2000:]


@pytest.mark.parametrize("name", [*SCRIPTS, "tiny.py"])
def test_it_is_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text("utf-8").splitlines()) <= 60
