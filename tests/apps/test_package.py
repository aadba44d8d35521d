"""What an installed mols-ds can do: its files, the jobs as commands, the version, completion; and a wheel by itself."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mols_ds import __version__, cli
from mols_ds.training.shipped import SHIPPED, copy_shipped, shipped_files, shipped_root
from tests.apps.command import ROOT, job_arguments, read_metrics, run, write_job
from tests.helpers.pages import blocks

EXAMPLE = "patched.py"
INSTALL_SECONDS = 1800.0  # minutes on a quiet machine


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    status = cli.main(argv)
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def test_configs_are_listed_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = printed(capsys, "configs").splitlines()
    assert shipped_root() == ROOT
    assert {"configs/ds_mols.json", "studies/laptop.yaml", "launch/torchrun.sh", "train.py"} <= set(names)
    assert printed(capsys, "configs", "configs/models", "studies/l*").splitlines() == [
        name for name in names if name.startswith(("configs/models/", "studies/l"))
    ]
    printed(capsys, "configs", "--copy", str(tmp_path))
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
        assert os.access(tmp_path / name, os.X_OK) == os.access(ROOT / name, os.X_OK), name
    assert stat.S_IMODE((tmp_path / "launch/deepspeed").stat().st_mode) & stat.S_IXUSR


def test_a_copy_never_replaces_a_changed_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies/smoke.yaml").write_text("mine", "utf-8")
    assert cli.main(["configs", "--copy", str(tmp_path)]) == 2
    assert "smoke.yaml exists and differs; nothing was copied" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["studies"]
    copy_shipped(shipped_files(["configs/data"]), tmp_path)
    copy_shipped(shipped_files(["configs/data"]), tmp_path)  # the same once more
    assert cli.main(["configs", "configs/nothing"]) == 2
    assert "no file matches configs/nothing" in capsys.readouterr().err


def test_setup_py_puts_the_same_files_into_a_wheel() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text("utf-8"))
    (value,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "SHIPPED"]
    assert ast.literal_eval(value) == SHIPPED
    manifest = (ROOT / "MANIFEST.in").read_text("utf-8").split()
    assert set(SHIPPED) <= set(manifest)


@pytest.mark.parametrize("start", [["-m", "mols_ds"], ["-m", "mols_ds.cli"]])
def test_version(start: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, *start, "--version"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"mols-ds {__version__}\n"), done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="the package shtab is not installed (extra completion)")
    script = printed(capsys, "completion", shell)
    assert "torchtitan" in script and "train-megatron" in script
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=script, text=True, timeout=30, check=True)


def test_completion_without_shtab_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install shtab" in capsys.readouterr().err


@pytest.mark.jobs
@pytest.mark.tier("all")
@pytest.mark.parametrize("count", [1, 2])
def test_train_is_a_command(count: int, tmp_path: Path) -> None:
    arguments = job_arguments(write_job(tmp_path), tmp_path / "out", "--steps", "4")
    command = [sys.executable, "-m", "mols_ds", "train", "--nproc", str(count), "--config", tmp_path / "ds.json"]
    done = run(*command, *arguments, cwd=tmp_path)
    assert done.status == 0, done.stderr[-3000:]
    assert ("2 processes" in done.stdout) == (count == 2)
    assert read_metrics(tmp_path / "out")[-1]["final"]


def test_a_mistake_in_a_job_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for job, script in (("train", "train.py"), ("finetune", "finetune.py"), ("train-megatron", "train_megatron.py")):
        assert cli.main([job, "--nproc", "1", "--nonsense"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"{script}: ") and err.count("\n") == 1
    assert cli.main(["train", "--nproc", "0"]) == 2
    assert capsys.readouterr().err.startswith("mols-ds train: argument --nproc")


# ---------------------------------------------------------------------- a wheel alone


@pytest.mark.jobs
@pytest.mark.tier("full")
@pytest.mark.timeout(7200)
def test_a_wheel_in_a_fresh_environment_does_what_its_page_says(tmp_path: Path) -> None:
    """The commands of docs/package.md and one example, in an empty folder, with nothing but the wheel."""
    source, place = tmp_path / "source", tmp_path / "empty"
    place.mkdir()
    skip = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "__pycache__", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, source, ignore=skip)
    python = tmp_path / "venv/bin/python"
    # Not of this repository: neither its folder nor its packages
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "DS_ACCELERATOR")}
    clean |= {"PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}

    def call(command: str, cwd: Path, seconds: float = 600.0) -> str:
        done = subprocess.run(
            ["bash", "-euc", command], cwd=cwd, env=clean, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    pip = f"{python} -m pip --disable-pip-version-check"
    probe = subprocess.run(f"{pip} download -q --no-deps shtab -d {tmp_path}/probe", shell=True, capture_output=True)
    if probe.returncode:
        pytest.skip(f"no package registry can be reached: {probe.stderr.decode()[-200:]}")
    call(f"{pip} wheel -q --no-deps -w {tmp_path}/dist {source}", tmp_path, INSTALL_SECONDS)
    (wheel,) = (tmp_path / "dist").glob("mols_ds-*.whl")
    shutil.rmtree(source)

    (block,) = (block for block in blocks("bash") if block.page == "docs/package.md")
    install, *commands = (line.partition("  #")[0].strip() for line in block.text.splitlines())
    assert install.startswith("pip install ") and wheel.name in install
    extras = re.search(r"\[(.*)\]", install)
    assert extras
    call(f"{pip} install -q -c {ROOT}/constraints.txt '{wheel}[{extras[1]}]'", place, INSTALL_SECONDS)
    outputs = [call(command, place, 1200.0) for command in commands]
    everything = "\n".join(outputs)
    assert f"mols-ds {__version__}" in everything and "Adam + MoLS" in everything and "alphas:" in everything
    assert (place / "configs/ds_mols.json").is_file()
    example = call(f"torchrun --standalone --nproc_per_node 2 examples/{EXAMPLE}", place)
    assert "fixed {" in example
    where = call(f'{python} -c "import mols_ds; print(mols_ds.__file__)"', place).strip()
    assert where.startswith(str(tmp_path / "venv"))
    assert "configs/ds_mols.json" in call("python -m mols_ds configs", place)
    call(
        "mols-ds train --steps 40 --out runs/shim --config configs/ds_mols_cpu.json --data configs/data/stdlib.json",
        place,
    )
