"""Arguments that the shim passes to DeepSpeed's launcher; starts nothing."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.launcher import runner

from mols_ds.apps.launch import deepspeed_cli as launcher

FLAGS = ["--hostfile", "hosts", "--include", "one@two:0", "--no_ssh", "--node_rank", "1", "--master_addr", "10.0.0.1"]
FLAGS += ["--master_port", "29777", "--enable_each_rank_log", "logs"]


class FakeProcess:
    """Stands where the launcher starts its processes; remembers the command."""

    commands: list[list[str]] = []  # noqa: RUF012
    returncode = 0

    def __init__(self, command: list[str], **_: Any) -> None:
        FakeProcess.commands.append(command)

    def wait(self) -> int:
        return 0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a script and a config, where nothing is started."""
    for name in ("train.py", "ds.json", "other.json"):
        (tmp_path / name).write_text("{}", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=FakeProcess))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    FakeProcess.commands = []
    return tmp_path


def script_command(*argv: str) -> list[str]:
    """The script and its arguments in the command that the shim starts for `argv`."""
    assert launcher.main(argv) == 0
    (command,) = FakeProcess.commands
    return command[command.index("train.py") :]


@pytest.mark.parametrize("option", [["--config", "ds.json"], ["--config=ds.json"]])
def test_config_reaches_the_script_as_arguments(folder: Path, option: list[str]) -> None:
    expected = ["train.py", "--steps", "5", "--deepspeed", "--deepspeed_config", str(folder / "ds.json")]
    assert script_command(*option, "--num_gpus", "2", "train.py", "--steps", "5") == expected


@pytest.mark.parametrize("own", ["--deepspeed_config", "--config"])
def test_what_the_user_gives_the_script_wins(folder: Path, own: str) -> None:
    assert script_command("--config", "ds.json", "train.py", own, "other.json") == ["train.py", own, "other.json"]


def test_config_behind_the_script_belongs_to_the_script(folder: Path) -> None:
    assert script_command("train.py", "--config", "ds.json") == ["train.py", "--config", "ds.json"]


def test_launchers_own_flags_still_work_on_several_nodes(folder: Path) -> None:
    (folder / "hosts").write_text("one slots=2\ntwo slots=2\n", "utf-8")
    launcher.main([*FLAGS, "--config", "ds.json", "train.py"])
    (command,) = FakeProcess.commands
    world = runner.encode_world_info({"one": [0, 1], "two": [0]})
    for expected in (f"--world_info={world}", "--master_port=29777", "--node_rank=1", "--enable_each_rank_log=logs"):
        assert expected in command
    assert command[-3:] == ["--deepspeed", "--deepspeed_config", str(folder / "ds.json")]


def test_what_the_launcher_refuses_is_one_line_and_status_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["--config", "ds.json", "--include", "nowhere:0", "train.py"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "deepspeed: Hostname 'nowhere' not found in hostfile"


@pytest.mark.parametrize("argv", [["--config", "none.json", "train.py"], ["--config", "ds.json", "none.py"]])
def test_missing_file_is_one_line_and_status_2(
    folder: Path, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no such" in line and "none" in line
    assert not FakeProcess.commands


def test_the_stock_launcher_is_left_as_it_was(folder: Path) -> None:
    before = (runner.parse_args, runner.argparse)
    launcher.main(["--config", "none.json", "train.py"])
    assert (runner.parse_args, runner.argparse) == before
    with pytest.raises(SystemExit):
        runner.parse_args(["--config", "ds.json", "train.py"])


def test_a_failed_process_s_status_is_the_shim_s(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeProcess, "returncode", 2)
    assert launcher.main(["--config", "ds.json", "train.py"]) == 2


HOSTS = "node01 slots=2\nnode02 slots=2\n"
REACHED = ["--hostfile", "hosts", "--no_ssh_check", "--master_addr", "10.0.0.1", "--master_port", "29777"]


@pytest.fixture
def cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two hosts, and every program that DeepSpeed's runners look for."""
    (folder / "hosts").write_text(HOSTS, "utf-8")
    for name in ("PDSHRunner", "OpenMPIRunner", "MPICHRunner", "SlurmRunner"):
        monkeypatch.setattr(getattr(runner, name), "backend_exists", lambda self: True)
    return folder


@pytest.mark.parametrize(
    ("name", "first", "part"),
    [
        ("pdsh", ["pdsh", "-S", "-f", "1024", "-w", "node01,node02"], "--master_addr=10.0.0.1"),
        ("openmpi", ["mpirun", "-n", "4", "-hostfile", "hosts"], "MASTER_ADDR=10.0.0.1"),
        ("mpich", ["mpirun", "-n", "4", "-ppn", "2"], "10.0.0.1"),
        ("slurm", ["srun", "-n", "4"], "MASTER_ADDR=10.0.0.1,MASTER_PORT=29777"),
    ],
)
def test_the_launchers_of_several_nodes(cluster: Path, name: str, first: list[str], part: str) -> None:
    """DeepSpeed's own runners build the command: the script, its arguments and the config come through, the config by
    its absolute path, and every rank can find rank 0."""
    expected = ["train.py", "--steps", "5", "--deepspeed", "--deepspeed_config", str(cluster / "ds.json")]
    found = script_command(*REACHED, "--launcher", name, "--config", "ds.json", "train.py", "--steps", "5")
    assert found == expected
    (command,) = FakeProcess.commands
    assert command[: len(first)] == first
    assert part in " ".join(command)
    assert sys.executable in command


def test_what_a_launcher_cannot_do_is_one_line_and_status_2(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main([*REACHED, "--launcher", "openmpi", "--include", "node01@node02", "train.py"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "deepspeed: openmpi backend does not support worker include/exclusion"


def test_a_launcher_that_a_signal_ended_is_a_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's runner takes only statuses above 0 for failures, and Popen's are negative then."""
    monkeypatch.setattr(FakeProcess, "returncode", -9)
    assert launcher.main(["--config", "ds.json", "train.py"]) == 128 + 9


@pytest.mark.parametrize("name", ["openmpi", "mpich", "slurm"])
def test_programs_that_pass_signals_on_get_the_one_that_they_pass_on(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sent: list[int] = []

    def wait(process: FakeProcess) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    monkeypatch.setattr(FakeProcess, "wait", wait)
    monkeypatch.setattr(FakeProcess, "send_signal", lambda process, number: sent.append(number), raising=False)
    assert launcher.main([*REACHED, "--launcher", name, "--config", "ds.json", "train.py"]) == 0
    assert sent == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
