"""Run a test function on N gloo ranks, many cases a launch.

Importing torch and DeepSpeed costs several seconds a process, so one launch works through a list of cases. A case that
fails or hangs ends its launch; a new launch goes on with the cases behind it, so that one bad case costs one test.
Every rank runs in a session of its own, which is killed as a whole when the time is up.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RANK_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
}
START_SECONDS = 120.0  # imports and the first rendezvous, on a machine that runs other work
GRACE_SECONDS = 3.0  # after the first rank failed, the time the others have to write their own traceback
LOG_LINES = 25
GIVE_UP_AFTER = 4  # failed cases in a row, each of which costs a launch
_POLL_SECONDS = 0.05


class RankError(AssertionError):
    """A case failed on at least one rank; the message holds what each rank said."""


@dataclass(slots=True)
class Results:
    """What the cases returned: `results[case]` is one value a rank, and raises `RankError` for a failed case."""

    values: dict[Hashable, list[Any]] = field(default_factory=dict)
    failures: dict[Hashable, str] = field(default_factory=dict)

    def __getitem__(self, case: Hashable) -> list[Any]:
        if case in self.failures:
            raise RankError(self.failures[case])
        return self.values[case]


def apply_environment(settings: dict[str, str]) -> None:
    """Set what the caller's environment does not set already."""
    for key, value in settings.items():
        os.environ.setdefault(key, value)


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Return `[fn(*args) of rank 0, of rank 1, ...]`; raise `RankError` with every rank's traceback or log."""
    return run_cases(fn, world_size, [args], timeout=timeout)[args]


def _importable(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a function that a fresh process cannot import."""
    if "<" in fn.__qualname__:
        raise ValueError(f"{fn.__qualname__} is not importable: define it at the top level of its module")
    return fn


def run_cases(
    fn: Callable[..., Any], world_size: int, cases: Sequence[tuple[Any, ...]], *, timeout: float = 90.0
) -> Results:
    """Call `fn(*case)` for each case on `world_size` ranks; `timeout` seconds is the limit of one case."""
    _importable(fn)
    results, position, in_a_row = Results(), 0, 0
    while position < len(cases) and in_a_row < GIVE_UP_AFTER:
        with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
            launch = _Launch(Path(folder), fn, world_size, cases[position:])
            done, failure = launch.work(timeout)
        for case, values in zip(cases[position:], done, strict=False):
            results.values[case] = values
        position += len(done)
        in_a_row = 0 if done else in_a_row
        if failure is not None and position < len(cases):
            results.failures[cases[position]] = f"{fn.__name__}{cases[position]} on {world_size} ranks: {failure}"
            position, in_a_row = position + 1, in_a_row + 1
    for case in cases[position:]:
        results.failures[case] = f"{fn.__name__}{case} was not run: {in_a_row} cases before it failed in a row"
    return results


class _Launch:
    """One set of rank processes that works through `cases` in order."""

    def __init__(self, folder: Path, fn: Callable[..., Any], world_size: int, cases: Sequence[tuple[Any, ...]]) -> None:
        self.folder, self.world_size, self.n_cases = folder, world_size, len(cases)
        with open(folder / "job.pkl", "wb") as file:
            pickle.dump((fn.__module__, fn.__qualname__, list(cases)), file)
        port = _free_port()
        self.ranks = [self._start(rank, port) for rank in range(world_size)]

    def _start(self, rank: int, port: int) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            **RANK_ENVIRONMENT,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        }
        with open(self.folder / f"log.{rank}", "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.harness", str(self.folder)],
                cwd=self.folder,  # what a case writes to its working folder vanishes with the launch
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def work(self, timeout: float) -> tuple[list[list[Any]], str | None]:
        """Wait for the ranks; return the values of the finished cases and what went wrong behind them."""
        failure = None
        try:
            finished, limit = 0, time.monotonic() + START_SECONDS + timeout
            while any(rank.poll() is None for rank in self.ranks):
                if any(rank.poll() not in (None, 0) for rank in self.ranks):
                    break
                if (now := self._finished()) > finished:
                    finished, limit = now, time.monotonic() + timeout
                if time.monotonic() > limit:
                    failure = f"no result within {timeout:.0f} s"
                    self._dump_stacks()
                    break
                time.sleep(_POLL_SECONDS)
            if failure is None and any(rank.poll() != 0 for rank in self.ranks):
                failure = "a rank failed"
                self._wait(GRACE_SECONDS)
        finally:
            self._kill()
        done = [[self._value(case, rank) for rank in range(self.world_size)] for case in range(self._finished())]
        return done, None if failure is None else f"{failure}\n{self._story(len(done))}"

    def _path(self, case: int, rank: int) -> Path:
        return self.folder / f"{case}.{rank}.pkl"

    def _finished(self) -> int:
        for case in range(self.n_cases):
            if not all(self._path(case, rank).exists() for rank in range(self.world_size)):
                return case
        return self.n_cases

    def _value(self, case: int, rank: int) -> Any:
        with open(self._path(case, rank), "rb") as file:
            return pickle.load(file)

    def _wait(self, seconds: float) -> None:
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and any(rank.poll() is None for rank in self.ranks):
            time.sleep(_POLL_SECONDS)

    def _dump_stacks(self) -> None:
        for rank in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.send_signal(signal.SIGUSR1)
        time.sleep(1.0)

    def _kill(self) -> None:
        for rank in self.ranks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.pid, signal.SIGKILL)  # start_new_session: the rank leads its group
            rank.wait()

    def _story(self, case: int) -> str:
        """What each rank said: the traceback of a failed case, otherwise the end of its log."""
        lines: list[str] = []
        for rank, process in enumerate(self.ranks):
            error, log = self.folder / f"{case}.{rank}.error", self.folder / f"log.{rank}"
            text = error.read_text() if error.exists() else log.read_text(errors="replace")
            lines += [f"[rank {rank}, status {process.returncode}] {line}" for line in text.splitlines()[-LOG_LINES:]]
        return "\n".join(lines)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with(parent: int) -> None:
    """End this rank when the process that started it is gone: a killed test run leaves nothing behind."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(3)


def _rank_main(folder: Path) -> None:
    import faulthandler

    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    import deepspeed
    import torch

    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed would compile its shared-memory all-reduce for inference at start (a minute, and a stale lock hangs it).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    with open(folder / "job.pkl", "rb") as file:
        module, qualname, cases = pickle.load(file)
    fn = getattr(importlib.import_module(module), qualname)
    rank = int(os.environ["RANK"])
    for number, case in enumerate(cases):
        try:
            value = fn(*case)
        except BaseException:
            (folder / f"{number}.{rank}.error").write_text(traceback.format_exc())
            os._exit(1)  # no clean-up: another rank may hang in a collective that this one never joins
        partial = folder / f"{number}.{rank}.partial"
        with open(partial, "wb") as file:
            pickle.dump(value, file)
        partial.rename(folder / f"{number}.{rank}.pkl")
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    _rank_main(Path(sys.argv[1]))
