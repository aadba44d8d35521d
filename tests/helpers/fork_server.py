"""The process that rank processes are forked from: torch and DeepSpeed are imported once, not once a rank.

`tests.helpers.harness` starts `python -m tests.helpers.fork_server FD` and sends requests over the socket FD; there is
one answer to each. A rank is forked on request and has its own session, working folder, log and
environment, and is reaped only on request, so that its process id stays its own until then. When the test run that
asked for the ranks is gone, the socket ends, and the server kills its ranks and ends too.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn


class ForkServer:
    """Starts, watches and ends ranks; the public methods are what a request can ask for."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._ranks: set[int] = set()

    def serve(self) -> None:
        """Answer `(method, arguments)` with `(value, None)` or `(None, traceback)` until the other side is gone."""
        try:
            while True:
                method, arguments = self._connection.recv()
                answer: tuple[Any, str | None]
                try:
                    answer = getattr(self, method)(*arguments), None
                except Exception:
                    answer = None, traceback.format_exc()
                self._connection.send(answer)
        except (EOFError, OSError):
            pass
        finally:
            for rank in list(self._ranks):
                self.end(rank)

    def preload(self, modules: Sequence[str]) -> None:
        """Import `modules` before the first rank is forked."""
        for module in modules:
            importlib.import_module(module)
        gc.collect()
        gc.freeze()  # the ranks share these objects' memory as long as no collection writes to them

    def start(self, folder: str, environment: dict[str, str]) -> int:
        """Fork a rank, which runs `rank_main`. Returns its process id.

        Raises:
            RuntimeError: this process has threads, whose locks a fork may leave held for ever.
        """
        tasks = sorted(Path("/proc/self/task").iterdir())  # Python's threads and those that libraries started
        if len(tasks) > 1:
            names = [(task / "comm").read_text().strip() for task in tasks]
            raise RuntimeError(f"cannot fork safely: a preloaded module started threads: {names}")
        sys.stdout.flush()
        server = os.getpid()
        rank = os.fork()
        if rank == 0:
            _become_rank(self._connection, server, Path(folder), environment)
        self._ranks.add(rank)
        return rank

    def status(self, rank: int) -> int | None:
        """The exit status of a rank (negative: the signal that ended it), None while it runs."""
        seen = os.waitid(os.P_PID, rank, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if seen is None:
            return None
        return seen.si_status if seen.si_code == os.CLD_EXITED else -seen.si_status

    def send_signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank (alone, without the processes that it started)."""
        os.kill(rank, number)

    def end(self, rank: int) -> int:
        """Kill a rank and all that it started, reap it, and return its exit status."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(rank, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)  # between the fork and its setsid it leads no group yet
        _, status = os.waitpid(rank, 0)
        self._ranks.discard(rank)
        return os.waitstatus_to_exitcode(status)


def _become_rank(connection: Connection, server: int, folder: Path, environment: dict[str, str]) -> NoReturn:
    """In the forked process: be as a freshly started one, then run the cases. Never returns."""
    try:
        os.setsid()
        connection.close()
        os.chdir(folder)  # what a case writes to its working folder vanishes with the launch
        log = os.open(f"log.{environment['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.environ.clear()
        os.environ.update(environment)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a killed rank has a log, too
        gc.enable()
        rank_main(folder, server)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


def _renew_random_state() -> None:
    """What is drawn from the system when a process starts must differ between ranks."""
    import numpy
    import torch

    random.seed()
    numpy.random.seed()
    torch.seed()


def _end_with(parent: int) -> None:
    """End this rank when the process that started it is gone: a killed test run leaves nothing behind."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def rank_main(folder: Path, parent: int) -> NoReturn:
    """Run the cases of `folder`/job.pkl as the rank that the environment names, a child of process `parent`."""
    import faulthandler

    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import deepspeed
    import torch

    _renew_random_state()
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed would compile its shared-memory all-reduce for inference at start (a minute, and a stale lock hangs it).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if os.environ.get("RANKS_JOIN") != "0":  # otherwise the case joins them itself
        deepspeed.init_distributed("gloo")
    with open(folder / "job.pkl", "rb") as file:
        module, qualname, cases = pickle.load(file)
    fn: Any = getattr(importlib.import_module(module), qualname)
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
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    gc.disable()  # until a rank: a collection between imports is wasted, and one after them unshares memory
    ForkServer(Connection(int(sys.argv[1]))).serve()
