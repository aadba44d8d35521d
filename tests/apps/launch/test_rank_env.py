"""Variables of srun and mpirun as those of torch.distributed; and the checks before a job."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mols_ds.apps.launch import health
from mols_ds.training import rank_env as rank_environment
from mols_ds.training.cli_utils import USER_MISTAKE
from mols_ds.training.rank_env import tasks_on_node
from mols_ds.training.ranks import run_command
from tests.helpers.ports import free_port

SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "MASTER_ADDR": "node01",
}  # fmt: skip
RANK = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "29500"}
MPI = {"RANK": "5", "SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SRUN, *RANK, "MASTER_ADDR", "RDZV_ENDPOINT", "OUT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("prefix", ["OMPI_COMM_WORLD_", "MV2_COMM_WORLD_"])
def test_mpirun(prefix: str) -> None:
    given = {f"{prefix}{name}": value for name, value in MPI.items()}
    assert rank_environment.rank_environment(given) == RANK


def test_srun() -> None:
    assert rank_environment.rank_environment(SRUN) == RANK
    assert rank_environment.rank_environment({**SRUN, "MASTER_PORT": "20007"})["MASTER_PORT"] == "20007"


def test_what_is_set_already_stays() -> None:
    """torchrun as a task of srun, and a batch script, which has SLURM's variables without being a task."""
    assert rank_environment.rank_environment({**SRUN, "RANK": "0"}) == {}
    batch = {name: value for name, value in SRUN.items() if "STEP" not in name}
    assert rank_environment.rank_environment(batch) == {}


def test_one_task_needs_no_address() -> None:
    alone = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert rank_environment.rank_environment(alone)["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("counts", "nodes"), [("4", [4]), ("4(x3)", [4, 4, 4]), ("4(x2),3", [4, 4, 3]), ("1,2", [1, 2]), ("?", [None])]
)
def test_tasks_on_node(counts: str, nodes: list[int | None]) -> None:
    assert [tasks_on_node(counts, node) for node in range(len(nodes))] == nodes
    assert tasks_on_node(counts, len(nodes)) is None


def test_ranks_that_do_not_know_the_first_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would train as jobs of one rank each, into the same folder."""
    for name, value in {**SRUN, "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR")
    for name in RANK:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert run_command("train.py", lambda: None) == USER_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: this process was started as rank 0 of 8, but MASTER_ADDR is not set")


# -- mols_ds.apps.launch.health


def test_health_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert health.main(["--disk", f"{tmp_path}=0", "--shm-gib", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[2].split()[-1] for line in lines] == ["gpus", "ecc", "xid", "shm", "disk"]
    assert health.FAILED not in "".join(lines)


def test_health_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("RANK", "0")
        assert health.main(["--gpus", "9999", "--disk", f"{tmp_path / 'new'}=1e9", "--shm-gib", "1e9"]) == 1
    failed = [line.split(": ")[2].split()[1] for line in capsys.readouterr().out.splitlines() if health.FAILED in line]
    assert failed == ["gpus", "shm", "disk", "master"]
    assert health.master("no-such-host.invalid", free_port(), first=False).state == health.FAILED


@pytest.mark.parametrize(
    ("rows", "state"),
    [
        (["0, 0, No, No", "1, [N/A], [N/A], [N/A]"], health.FINE),
        (["0, 0, No, No", "1, 2, No, No"], health.FAILED),
        (["0, 0, Yes, No"], health.FAILED),
    ],
)
def test_health_reads_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[str], state: str) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\ncat <<EOF\n" + "\n".join(rows) + "\nEOF\n", "utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert health.memory_errors().state == state


def test_health_of_a_collective_needs_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert health.main(["--collective", "--disk", ".=0", "--shm-gib", "0"]) == USER_MISTAKE
    assert "start it with torchrun" in capsys.readouterr().err
