"""What the shim hands to DeepSpeed's launcher, without starting anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.launcher import runner

from mols_ds import launcher

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
