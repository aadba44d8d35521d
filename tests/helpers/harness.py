"""Run a test function on N gloo ranks, many cases a launch.

Importing torch and DeepSpeed and joining a process group costs seconds a process. So ranks are forked from servers that
have imported what most tests need (tests/helpers/fork_server.py), and one launch works through a list of cases. A case
that fails or hangs ends its launch; a new launch continues with the next cases, so one bad case costs one test.
Every rank runs in its own session, which is killed as a whole after a timeout.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
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
PRELOADED = (
    "pytest",
    "torch",
    "deepspeed",
    "torch._inductor.compile_fx",  # deepspeed.initialize imports it
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
)
# Ranks forked from one server share its hash seed, which hides an order of a set that differs between ranks. With
# three servers, no two ranks that are 1, 2, 4, ... apart share one, and those are the ranks that form a group.
SERVERS = 3
ENVIRONMENTS = 2  # whose servers are kept; a server holds about 300 MB
ANSWER_SECONDS = 60.0
_POLL_SECONDS = 0.05


class RankError(AssertionError):
    """A case failed on at least one rank; the message has each rank's output."""


@dataclass(slots=True)
class Results:
    """What the cases returned: `results[case]` is one value a rank, and raises `RankError` for a failed case."""

    values: dict[Hashable, list[Any]] = field(default_factory=dict)
    failures: dict[Hashable, str] = field(default_factory=dict)

    def __getitem__(self, case: Hashable) -> list[Any]:
        if case in self.failures:
            raise RankError(self.failures[case])
        if case not in self.values:
            raise KeyError(f"{case} was not launched: does the test say that it reads it (tests.helpers.tiers.Cases)?")
        return self.values[case]


def apply_environment(settings: dict[str, str]) -> None:
    """Set what the caller's environment does not set already."""
    for key, value in settings.items():
        os.environ.setdefault(key, value)


def draw_nothing() -> None:
    """On a rank, not in pytest's own process: there is no matplotlib, whose plots take a second for each engine."""
    if "RANK" in os.environ:
        sys.modules.setdefault("matplotlib", None)  # type: ignore[arg-type]


@contextlib.contextmanager
def pictures_allowed() -> Iterator[None]:
    """For imports of libraries that stop where matplotlib is installed and cannot be imported (torchmetrics)."""
    hidden = "matplotlib" in sys.modules and sys.modules["matplotlib"] is None
    if hidden:
        del sys.modules["matplotlib"]
    try:
        yield
    finally:
        if hidden:
            sys.modules["matplotlib"] = None  # type: ignore[assignment]


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Return `[fn(*args) of rank 0, of rank 1, ...]`; raise `RankError` with every rank's traceback or log."""
    return run_cases(fn, world_size, [args], timeout=timeout, environment=environment)[args]


def _importable(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a function that a fresh process cannot import."""
    if "<" in fn.__qualname__:
        raise ValueError(f"{fn.__qualname__} is not importable: define it at the top level of its module")
    return fn


def run_cases(
    fn: Callable[..., Any],
    world_size: int,
    cases: Sequence[tuple[Any, ...]],
    *,
    timeout: float = 90.0,
    environment: Mapping[str, str] | None = None,
) -> Results:
    """Call `fn(*case)` for each case on `world_size` ranks; `timeout` seconds is the limit of one case.

    `environment` adds to this process's variables or replaces them (PYTHONPATH: what follows the repository); each
    distinct one has its own servers.
    """
    _importable(fn)
    settings = _rank_environment(environment or {})
    results, position, in_a_row = Results(), 0, 0
    while position < len(cases) and in_a_row < GIVE_UP_AFTER:
        with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
            launch = _Launch(Path(folder), fn, world_size, cases[position:], settings)
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


def _rank_environment(more: Mapping[str, str]) -> dict[str, str]:
    """The variables of every rank, but for those that name the rank and the launch."""
    result = {**os.environ, **RANK_ENVIRONMENT, **more}
    result["PYTHONPATH"] = os.pathsep.join([str(ROOT), result.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    result.pop("PYTEST_CURRENT_TEST", None)  # differs from test to test, and with it the servers would
    return result


class _Server:
    """This side of a `fork_server.ForkServer` process, which starts to import as soon as this object exists."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        self._connection, theirs = multiprocessing.Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fork_server", str(theirs.fileno())],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        self.closed, self._imported = False, False
        with contextlib.suppress(ConnectionError):  # gone already: the first answer that is waited for tells
            more = environment.get("RANKS_PRELOAD", "").split()
            self._connection.send(("preload", ((*PRELOADED, *more),)))

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the server; any error closes the server and ends its ranks."""
        try:
            if not self._imported:
                self._answer(START_SECONDS)
                self._imported = True
            return self._answer(ANSWER_SECONDS, (method, arguments))
        except BaseException:  # also the test's own time limit: a late answer would pass for the next one
            self.close()
            raise

    def _answer(self, seconds: float, request: tuple[str, tuple[Any, ...]] | None = None) -> Any:
        try:
            if request is not None:
                self._connection.send(request)
            if not self._connection.poll(seconds):
                raise RuntimeError(f"the fork server said nothing for {seconds:.0f} s\n{self._story()}")
            value, error = self._connection.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(f"the fork server is gone\n{self._story()}") from None
        if error is not None:
            raise RuntimeError(f"the fork server failed: {error}")
        return value

    def _story(self) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-LOG_LINES:])

    def close(self) -> None:
        """End the server and its ranks."""
        if self.closed:
            return
        self.closed = True
        self._connection.close()
        try:
            self._process.wait(ANSWER_SECONDS)
        except subprocess.TimeoutExpired:  # it still imports; or a rank cannot be killed
            self._process.kill()
            self._process.wait()
        self._log.close()


class _Servers:
    """The servers of this test run, by environment."""

    def __init__(self) -> None:
        self._of: dict[Hashable, dict[int, _Server]] = {}
        atexit.register(self.close)

    def of(self, n_ranks: int, environment: dict[str, str]) -> list[_Server]:
        """A server for each rank. Those that do not run yet are all started before the first is waited for."""
        key = tuple(sorted(environment.items()))
        servers = self._of.pop(key, {})
        self._of[key] = servers  # the youngest is last
        while len(self._of) > ENVIRONMENTS:
            self._close(next(iter(self._of)))
        for number in range(min(n_ranks, SERVERS)):
            if number not in servers or servers[number].closed:
                servers[number] = _Server(environment)
        return [servers[rank % SERVERS] for rank in range(n_ranks)]

    def _close(self, key: Hashable) -> None:
        for server in self._of.pop(key).values():
            server.close()

    def close(self) -> None:
        """End all servers."""
        for key in list(self._of):
            self._close(key)


@functools.cache
def _servers() -> _Servers:
    return _Servers()


class _Rank:
    """A process forked by a server."""

    def __init__(self, server: _Server, folder: Path, environment: dict[str, str]) -> None:
        self._server = server
        self._process: int = server.ask("start", str(folder), environment)
        self.status: int | None = None

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while the rank runs."""
        if self.status is None:
            self.status = self._server.ask("status", self._process)
        return self.status

    def dump_stack(self) -> None:
        self._server.ask("send_signal", self._process, int(signal.SIGUSR1))

    def end(self) -> None:
        """Kill the rank and its child processes."""
        if not self._server.closed:
            self.status = self._server.ask("end", self._process)


class _Launch:
    """One set of rank processes that works through `cases` in order."""

    def __init__(
        self,
        folder: Path,
        fn: Callable[..., Any],
        world_size: int,
        cases: Sequence[tuple[Any, ...]],
        environment: dict[str, str],
    ) -> None:
        self.folder, self.world_size, self.n_cases = folder, world_size, len(cases)
        self.environment = environment
        self.ranks: list[_Rank] = []
        with open(folder / "job.pkl", "wb") as file:
            pickle.dump((fn.__module__, fn.__qualname__, list(cases)), file)

    def _start(self) -> None:
        port = free_port()
        for rank, server in enumerate(_servers().of(self.world_size, self.environment)):
            named = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.world_size),
                "LOCAL_WORLD_SIZE": str(self.world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            self.ranks.append(_Rank(server, self.folder, {**self.environment, **named}))

    def work(self, timeout: float) -> tuple[list[list[Any]], str | None]:
        """Wait for the ranks; return the values of the finished cases and what went wrong behind them."""
        failure = None
        try:
            self._start()
            finished, limit = 0, time.monotonic() + START_SECONDS + timeout
            while any([rank.poll() is None for rank in self.ranks]):
                if any(rank.status not in (None, 0) for rank in self.ranks):
                    break
                if (now := self._finished()) > finished:
                    finished, limit = now, time.monotonic() + timeout
                if time.monotonic() > limit:
                    failure = f"no result within {timeout:.0f} s"
                    self._dump_stacks()
                    break
                time.sleep(_POLL_SECONDS)
            if failure is None and any(rank.status != 0 for rank in self.ranks):
                failure = "a rank failed"
                self._wait(GRACE_SECONDS)
        finally:
            for rank in self.ranks:
                rank.end()
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
        while time.monotonic() < limit and any([rank.poll() is None for rank in self.ranks]):
            time.sleep(_POLL_SECONDS)

    def _dump_stacks(self) -> None:
        for rank in self.ranks:
            rank.dump_stack()
        time.sleep(1.0)

    def _story(self, case: int) -> str:
        """Output of each rank: the traceback of a failed case, otherwise the end of its log."""
        lines: list[str] = []
        for number, rank in enumerate(self.ranks):
            error, log = self.folder / f"{case}.{number}.error", self.folder / f"log.{number}"
            text = error.read_text() if error.exists() else log.read_text(errors="replace")
            lines += [f"[rank {number}, status {rank.status}] {line}" for line in text.splitlines()[-LOG_LINES:]]
        return "\n".join(lines)
