"""A run that a scheduler and a person interrupt and that is extended is the undisturbed run. Ctrl-C on a terminal."""

from __future__ import annotations

import contextlib
import functools
import os
import pty
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mols_ds.training.trainer import TIMED
from tests.apps.command import SHIM, TRAIN, job_arguments, read_metrics, write_job
from tests.apps.launch.running import TIME_LIMIT, started, variables
from tests.apps.mains import call
from tests.helpers.harness import run_ranks
from tests.helpers.ports import free_port

pytestmark = [pytest.mark.jobs, pytest.mark.tier("all")]


class Terminal:
    """A command on a terminal of its own, as the foreground job of a new session."""

    def __init__(self, command: Sequence[str | Path], folder: Path) -> None:
        self.text = b""
        words = [str(word) for word in command]
        self.pid, self._screen = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe(words[0], words, variables(folder))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone with its last process
            while part := os.read(self._screen, 4096):
                self.text += part

    def interrupt(self) -> None:
        """Ctrl-C: the terminal signals the whole foreground process group."""
        os.write(self._screen, b"\x03")

    def wait(self) -> int:
        """The exit status, 128 + n after signal n."""
        limit = time.monotonic() + TIME_LIMIT
        while time.monotonic() < limit:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self._reader.join(5)
                code = os.waitstatus_to_exitcode(status)
                return 128 - code if code < 0 else code
            time.sleep(0.05)
        raise AssertionError(f"no end within {TIME_LIMIT:.0f} s\n{self.text.decode()[-4000:]}")


@contextlib.contextmanager
def terminal(command: Sequence[str | Path], folder: Path) -> Iterator[Terminal]:
    """Start a command on a terminal; kill it and all that it has started at the end."""
    running = Terminal(command, folder)
    try:
        yield running
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(running.pid)
            for each in [*process.children(recursive=True), process]:
                each.kill()


def until(out: Path, step: int, running: Terminal | None = None) -> None:
    """Wait until the metrics have line `step`, while `running` runs."""
    limit = time.monotonic() + TIME_LIMIT
    path = out / "metrics.jsonl"
    while not path.is_file() or path.read_bytes().count(b"\n") < step:
        assert time.monotonic() < limit, f"no step {step} within {TIME_LIMIT:.0f} s"
        assert running is None or os.waitpid(running.pid, os.WNOHANG) == (0, 0), running.text.decode()[-4000:]
        time.sleep(0.02)


def job(folder: Path, steps: int) -> tuple[list[str], list[str]]:
    """(arguments of the run, config's): a schedule that does not depend on the number of steps."""
    mols = {"mode": "online", "start": steps // 8, "samples": 4, "ramp_end": steps // 2, "total_steps": steps}
    warmup = {"warmup_min_lr": 0, "warmup_max_lr": 1e-2, "warmup_num_steps": 5}
    paths = write_job(folder, mols=mols, scheduler={"type": "WarmupLR", "params": warmup})
    fixed = job_arguments(paths, folder / "out", "--eval-every", str(steps // 4))
    return fixed, ["--deepspeed_config", str(paths["config"])]


def train(*arguments: str) -> int:
    """train.py on a rank of the harness."""
    done = call(*arguments)
    assert done.status == 0, done.stderr
    return done.status


def stopped_at(out: str, step: int, *arguments: str) -> int:
    """The same; a scheduler signals one rank after `step`."""
    import torch.distributed as dist

    def send() -> None:
        until(Path(out), step)
        os.kill(os.getpid(), signal.SIGTERM)

    if dist.get_rank() == 1:
        threading.Thread(target=send, daemon=True).start()
    return train(*arguments)


def comparable(out: Path) -> list[dict[str, Any]]:
    """The metrics without what differs between two runs."""
    return [{key: value for key, value in line.items() if key not in TIMED} for line in read_metrics(out)]


def weights(out: Path, steps: int) -> dict[str, torch.Tensor]:
    states = torch.load(out / "checkpoints" / f"step{steps}" / "mp_rank_00_model_states.pt", weights_only=False)
    found: dict[str, torch.Tensor] = states["module"]
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("steps", [40, pytest.param(500, marks=pytest.mark.tier("full"))])
def test_a_run_killed_twice_and_extended_once_is_the_undisturbed_run(steps: int, tmp_path: Path) -> None:
    arguments, config = job(tmp_path, steps)
    out, whole = tmp_path / "out", tmp_path / "whole"
    longer, shorter = ["--steps", str(steps)], ["--steps", str(steps * 3 // 4)]
    run_ranks(train, 2, *arguments, *config, *longer, "--out", str(whole), timeout=300)
    launch = [sys.executable, SHIM, "-q", "--master_port", str(free_port()), "--num_gpus", "2", TRAIN, *arguments]
    run_ranks(stopped_at, 2, str(out), steps // 5, *arguments, *config, *shorter, timeout=300)
    assert 0 < len(read_metrics(out)) < steps // 2
    with terminal([*launch, *config, *shorter, "--resume"], tmp_path) as second:
        until(out, len(read_metrics(out)) + 3, second)
        second.interrupt()
        assert second.wait() == 0, second.text
    stopped = [line for line in second.text.decode().splitlines() if "stopped by" in line]
    assert len(stopped) == 1 and "train.py: stopped by SIGINT after step" in stopped[0], second.text
    assert b"Traceback" not in second.text
    middle = read_metrics(out)
    assert not middle[-1].get("final") and len(middle) < steps * 3 // 4
    run_ranks(train, 2, *arguments, *config, *shorter, "--resume", timeout=300)
    assert read_metrics(out)[-1]["final"]
    run_ranks(train, 2, *arguments, *config, *longer, "--resume", timeout=300)
    assert [line["step"] for line in comparable(out)[:-1]] == list(range(1, steps + 1))
    assert comparable(out) == comparable(whole)
    ours, theirs = weights(out, steps), weights(whole, steps)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@functools.cache
def _job_of_one(folder: Path) -> list[str]:
    arguments, config = job(folder, 100_000)
    return [sys.executable, str(TRAIN), *arguments, *config, "--steps", "100000"]


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    """The first one waits for a step that hangs."""
    hang = tmp_path / "hang.py"
    hang.write_text(
        "import sys, time\n"
        "from mols_ds.training import trainer\n"
        "from mols_ds.apps.train import main\n"
        "stock = trainer.Trainer._after_update\n"
        "def slow(*args):\n"
        "    found = stock(*args)\n"
        "    time.sleep(600)\n"
        "    return found\n"
        "trainer.Trainer._after_update = slow\n"
        "sys.exit(main())\n",
        "utf-8",
    )
    command = _job_of_one(tmp_path)
    with terminal([command[0], hang, *command[2:]], tmp_path) as running:
        until(tmp_path / "out", 1)
        running.interrupt()
        time.sleep(1)
        assert os.waitpid(running.pid, os.WNOHANG) == (0, 0)
        running.interrupt()
        assert running.wait() == 128 + signal.SIGINT
    assert b"Traceback" not in running.text


def test_ctrl_c_before_the_first_step_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "stop.py").write_text(
        "import sys\n"
        "from mols_ds.apps import train\n"
        "def prepare(*args, **more):\n"
        "    raise KeyboardInterrupt\n"
        "train.prepare = prepare\n"
        "sys.exit(train.main())\n",
        "utf-8",
    )
    command = _job_of_one(tmp_path)
    with started([command[0], tmp_path / "stop.py", *command[2:]], tmp_path) as running:
        assert running.wait() == 128 + signal.SIGINT
    assert running.text.splitlines() == ["train.py: stopped by SIGINT before the first step; nothing is saved"]
