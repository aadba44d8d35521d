"""Every example runs as its first lines say, is short, and has a page that shows its code and what it printed."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.apps.command import ROOT, Done, run
from tests.helpers.harness import pictures_allowed, run_ranks

EXAMPLES = ROOT / "examples"
COMMAND = "plain_loop.py"
"""The example that `make test-all` starts by torchrun."""
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


def script_of(name: str, cwd: Path) -> Path:
    """The file that every rank runs."""
    script = EXAMPLES / name
    if name == "lightning_module.py":
        (cwd / "on_cpu.py").write_text(ON_CPU.format(folder=str(EXAMPLES), script=str(script)), "utf-8")
        script = cwd / "on_cpu.py"
    return script


def start(name: str, cwd: Path) -> Done:
    """Run the example as its first lines say: two processes of torchrun."""
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    return run(*launch, script_of(name, cwd), cwd=cwd)


def printed_by(name: str) -> str:
    """On a rank that has imported torch and DeepSpeed already: what the example prints."""
    script, text = script_of(name, Path.cwd()), io.StringIO()
    sys.argv, sys.path[:0] = [str(script)], [str(EXAMPLES)]
    with pictures_allowed(), contextlib.redirect_stdout(text):
        runpy.run_path(str(script), run_name="__main__")
    return text.getvalue()


def page_of(name: str) -> str:
    return (ROOT / "docs/examples" / f"{Path(name).stem}.md").read_text("utf-8")


def alphas_in(text: str) -> dict[str, float]:
    """The last line that an example prints."""
    (line,) = [line for line in text.splitlines() if line.startswith("fixed {")]
    alphas: dict[str, float] = ast.literal_eval(line.removeprefix("fixed "))
    assert "qk" in alphas
    return alphas


def need(name: str) -> None:
    """Skip an example whose libraries are not there."""
    missing = [package for package in NEEDS.get(name, ()) if find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")


@pytest.mark.jobs
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.tier("all" if name == COMMAND else "full")) for name in SCRIPTS]
)
def test_it_ends_with_alphas(name: str, tmp_path: Path) -> None:
    need(name)
    done = start(name, tmp_path)
    assert done.status == 0, done.stderr[-3000:]
    assert set(alphas_in(done.stdout)) == set(alphas_in(page_of(name))), done.stdout[-2000:]


@pytest.mark.distributed
@pytest.mark.tier("all")
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != COMMAND])
def test_it_ends_with_alphas_on_forked_ranks(name: str) -> None:
    need(name)
    first, _ = run_ranks(printed_by, 2, name, environment={"RANKS_JOIN": "0"})
    assert set(alphas_in(first)) == set(alphas_in(page_of(name))), first[-2000:]


@pytest.mark.parametrize("name", [*SCRIPTS, "tiny.py"])
def test_it_is_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text("utf-8").splitlines()) <= 60


@pytest.mark.parametrize("name", SCRIPTS)
def test_its_page_is_current(name: str) -> None:
    """What it printed depends on the machine; the rest of the page is its docstring and code."""
    page = page_of(name)
    before, mark, printed = page.rpartition("```text\n")
    assert mark and re.search(r"\nMoLS at step (4|12): 8 gradient samples", printed)
    expected = runpy.run_path(str(ROOT / "docs/write_examples.py"))["page"](name, None)
    assert before == expected.rpartition("```text\n")[0], "run `make examples`"
