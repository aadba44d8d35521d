"""A command of launch/ that runs beside the test, until it ends or its time is up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.apps.command import ROOT
from tests.helpers.harness import RANK_ENVIRONMENT

LAUNCH = ROOT / "launch"
TIME_LIMIT = 200.0  # several start-ups of torch and DeepSpeed on a machine that runs other work


@dataclass(frozen=True)
class Running:
    """A started command and the file that it writes to."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def wait(self) -> int:
        """The exit status."""
        try:
            return self.process.wait(TIME_LIMIT)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {TIME_LIMIT:.0f} s\n{self.text[-6000:]}") from None

    def until(self, *paths: Path) -> None:
        """Waits for files that the command is to make."""
        limit = time.monotonic() + TIME_LIMIT
        while not all(path.exists() for path in paths):
            assert self.process.poll() is None, f"ended with {self.process.returncode}\n{self.text[-6000:]}"
            assert time.monotonic() < limit, f"{paths} not made within {TIME_LIMIT:.0f} s\n{self.text[-6000:]}"
            time.sleep(0.05)


CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR")


def variables(folder: Path, **more: str | Path) -> dict[str, str]:
    """The environment of a command: the CPU, launch/ and this Python first on PATH, caches and health checks that ask
    little of this machine."""
    places = [folder / "bin", LAUNCH, Path(sys.executable).parent, os.environ["PATH"]]
    ours = {
        "PATH": os.pathsep.join(map(str, places)),
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        "HEALTH": "--disk .=0 --shm-gib 0",
        "CACHE_SHARED": str(folder / "shared"),
        "CACHE_LOCAL": str(folder / "local"),
    }
    # torch sets TORCHINDUCTOR_CACHE_DIR in this process where a test before has imported its compiler
    outside = {name: value for name, value in os.environ.items() if name not in CACHES}
    return {**outside, **RANK_ENVIRONMENT, **ours, **{name: str(value) for name, value in more.items()}}


@contextlib.contextmanager
def started(command: Sequence[str | Path], folder: Path, **more: str | Path) -> Iterator[Running]:
    """Starts a command in a session of its own, in the project's folder, with `more` environment variables. Kills it
    and all that it has started at the end."""
    log = folder / f"log.{len(list(folder.glob('log.*')))}"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(word) for word in command], cwd=ROOT, env=variables(folder, **more), stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield Running(process, log)
    finally:
        below = []
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()


def finish(command: Sequence[str | Path], folder: Path, **more: str | Path) -> str:
    """Runs a command to its end, which must be a good one. Returns what it wrote."""
    with started(command, folder, **more) as running:
        status = running.wait()
        assert status == 0, f"status {status}\n{running.text[-6000:]}"
        return running.text
