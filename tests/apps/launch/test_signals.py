"""SIGTERM and SIGUSR1 reach the ranks through each launcher, and their status 0 comes back.

The launchers are real; what they start is tests/apps/launch/stub.py, which has no torch to import.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mols_ds.apps.launch import signals
from mols_ds.training.cli_utils import COMMAND_NOT_FOUND, FAILED
from tests.apps.command import ROOT
from tests.apps.launch.network import NAMES, Hosts, two_hosts
from tests.apps.launch.running import LAUNCH, Running, finish, started
from tests.helpers.ports import free_port

STUB = ROOT / "tests" / "apps" / "launch" / "stub.py"
RUN = [sys.executable, "-m", "mols_ds.signals", "run"]
# A launcher of two ranks, the second of which has a child that is none
BASH = f"""
for rank in 0 1; do LOCAL_RANK=$rank RANK=$rank {sys.executable} {STUB} --out "$OUT" $MORE & ranks="$ranks $!"; done
for rank in $ranks; do wait $rank || exit; done
"""


def ready(running: Running, out: Path, ranks: int = 2) -> None:
    running.until(*(out / f"ready.{rank}" for rank in range(ranks)))


def heard(out: Path) -> set[str]:
    return {path.read_text("utf-8") for path in out.glob("heard.*")}


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_supervisor_hands_signals_to_the_ranks(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    with started([*RUN, "--out", out, "--unfinished", "143", "--", "bash", "-c", BASH], tmp_path, OUT=out) as running:
        ready(running, out)
        running.process.send_signal(number)
        assert running.wait() == 143
    assert heard(out) == {number.name}
    assert f"{number.name} goes to 2 ranks" in running.text
    with started([*RUN, "--out", out, "--", "bash", "-c", BASH], tmp_path, OUT=out, MORE="--resume") as running:
        assert running.wait() == 0


@pytest.mark.parametrize(("number", "heard_as"), [(signal.SIGINT, "SIGINT"), (signal.SIGHUP, "SIGTERM")])
def test_a_ctrl_c_or_a_closed_terminal_is_a_signal_to_the_ranks(
    tmp_path: Path, number: signal.Signals, heard_as: str
) -> None:
    """The terminal signals the supervisor's process group, in which the launcher is not."""
    out = tmp_path / "out"
    with started([*RUN, "--", "bash", "-c", BASH], tmp_path, OUT=out, MORE="") as running:
        ready(running, out)
        os.killpg(running.process.pid, number)
        assert running.wait() == 0
    assert heard(out) == {heard_as} and not running.text


def test_a_second_ctrl_c_kills_the_ranks(tmp_path: Path) -> None:
    with started([*RUN, "--", "bash", "-c", BASH], tmp_path, OUT=tmp_path / "out", MORE="--deaf") as running:
        ready(running, tmp_path / "out")
        ranks = signals.ranks_below(running.process.pid)
        running.process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == 128 + signal.SIGINT
        assert psutil.wait_procs(ranks, 10)[1] == []


@pytest.mark.tier("all")
def test_supervisor_ends_ranks_that_do_not_end_in_time(tmp_path: Path) -> None:
    command = [*RUN, "--grace", "0.5", "--", "bash", "-c", BASH]
    with started(command, tmp_path, OUT=tmp_path / "out", MORE="--deaf") as running:
        ready(running, tmp_path / "out")
        ranks = signals.ranks_below(running.process.pid)
        assert len(ranks) == 2
        running.process.send_signal(signal.SIGTERM)
        assert running.wait() == 128 + signal.SIGTERM
        assert psutil.wait_procs(ranks, 10)[1] == []


@pytest.mark.tier("all")
def test_supervisor_ends_a_launcher_without_ranks(tmp_path: Path) -> None:
    with started([*RUN, "--grace", "0.5", "sleep", "60"], tmp_path) as running:
        child = children(running)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait() == 128 + signal.SIGTERM
        assert psutil.wait_procs(child, 10)[1] == []


def children(running: Running) -> list[psutil.Process]:
    """The processes below a supervisor that has just been started, as soon as it has some and hears signals."""
    supervisor, limit = psutil.Process(running.process.pid), time.monotonic() + 60
    while not (found := supervisor.children(recursive=True)) or not hears(supervisor.pid, signal.SIGTERM):
        assert time.monotonic() < limit
        time.sleep(0.05)
    return found


def hears(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for this signal."""
    (caught,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.tier("all")
def test_supervisor_ends_a_launcher_that_begins_again(tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    script = f"(OUT={out}; {BASH}); OUT={again}; {BASH}"
    with started([*RUN, "--", "bash", "-c", script], tmp_path, MORE="") as running:
        ready(running, out)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait() == 128 + signal.SIGTERM
    assert "ending the launcher" in running.text


def test_supervisor_hands_the_status_on(tmp_path: Path) -> None:
    for command, status in (("exit 7", 7), ("kill -KILL $$", 128 + 9)):
        with started([*RUN, "bash", "-c", command], tmp_path) as running:
            assert running.wait() == status
    with started([*RUN, "no-such-command"], tmp_path) as running:
        assert running.wait() == COMMAND_NOT_FOUND
    assert "no-such-command: No such file" in running.text


@pytest.mark.tier("all")
def test_send_finds_the_ranks_of_one_job_only(tmp_path: Path) -> None:
    port = free_port()
    outs = [tmp_path / "one", tmp_path / "other"]
    with (
        started(["bash", "-c", BASH], tmp_path, OUT=outs[0], MASTER_PORT=str(port)) as one,
        started(["bash", "-c", BASH], tmp_path, OUT=outs[1], MASTER_PORT="1") as other,
    ):
        ready(one, outs[0])
        ready(other, outs[1])
        assert signals.main(["send", "SIGUSR1", "--port", str(port)]) == 0
        assert one.wait() == 0
        assert other.process.poll() is None
        assert (heard(outs[0]), heard(outs[1])) == ({"SIGUSR1"}, set())
        assert signals.main(["send", "SIGUSR1", "--port", str(port)]) == FAILED


@pytest.mark.jobs
def test_shim_on_one_node(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), STUB, "--out", out]
    with started(command, tmp_path) as running:
        ready(running, out)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait() == 0, running.text
    assert heard(out) == {"SIGTERM"}


@pytest.mark.jobs
@pytest.mark.tier("all")
def test_torchrun_on_one_node_as_in_a_container(tmp_path: Path) -> None:
    """As in launch/kubernetes: one process, which gets SIGTERM, and a status that has the pod started again; then the
    run goes on from its checkpoint."""
    variables = {"OUT": tmp_path / "out", "NPROC": "2", "RDZV_ENDPOINT": "127.0.0.1:0", "UNFINISHED": "143"}
    with started([LAUNCH / "torchrun.sh", STUB], tmp_path, **variables) as running:
        ready(running, tmp_path / "out")
        running.process.send_signal(signal.SIGTERM)
        assert running.wait() == 143, running.text
    assert heard(tmp_path / "out") == {"SIGTERM"}
    finish([LAUNCH / "torchrun.sh", STUB], tmp_path, HEALTH="off", **variables)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with two_hosts(tmp_path) as both:
        yield both


@pytest.mark.jobs
@pytest.mark.tier("all")
def test_shim_reaches_the_ranks_of_all_hosts(hosts: Hosts) -> None:
    out = hosts.folder / "out"
    hostfile = hosts.folder / "hostfile"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in NAMES), "utf-8")
    command = ["deepspeed", "--hostfile", hostfile, "--master_port", str(free_port()), STUB, "--out", out]
    with started(hosts.command(0, *command), hosts.folder) as running:
        ready(running, out)
        running.process.send_signal(signal.SIGUSR1)
        assert running.wait() == 0, running.text
    assert heard(out) == {"SIGUSR1"}


@pytest.mark.jobs
@pytest.mark.tier("all")
def test_batch_job_is_queued_again_and_goes_on(hosts: Hosts) -> None:
    """launch/slurm/megatron.sbatch: the batch shell gets SIGUSR1 before the time limit. One task a node, with torchrun
    and one rank each."""
    out = hosts.folder / "out"
    batch = hosts.command(0, "bash", LAUNCH / "slurm" / "megatron.sbatch")
    job = {"SLURM_JOB_ID": "41", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_SUBMIT_DIR": str(ROOT)}
    job |= {"SLURM_JOB_NODELIST": ",".join(NAMES), "NPROC": "1", "SCRIPT": str(STUB), "OUT": str(out), "HEALTH": "off"}
    requeued = hosts.folder / "bin" / "requeued"
    with started(batch, hosts.folder, **job) as running:
        ready(running, out)
        running.process.send_signal(signal.SIGUSR1)
        assert running.wait() == 0, running.text
    assert heard(out) == {"SIGUSR1"}
    assert requeued.read_text("utf-8").split() == ["41"]
    finish(batch, hosts.folder, **job, SLURM_RESTART_COUNT="1")
    assert requeued.read_text("utf-8").split() == ["41"]
