"""Execute the runs of a study: in processes of this machine, one run each, or on all ranks of a launched job together,
one run after the other."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from mols_ds.apps.study.costs import measure
from mols_ds.apps.study.runs import Store, StudyRun, needed
from mols_ds.apps.study.spec import Study
from mols_ds.apps.study.work import Worker
from mols_ds.core.json_types import JsonObject
from mols_ds.engines.deepspeed.compat import skip_shm_kernel
from mols_ds.errors import MolsError
from mols_ds.report.files import draw_no_plots
from mols_ds.training.kernel_caches import check_kernel_caches

POLL_SECONDS = 1.0
KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""For glibc: keep freed memory. Else a tensor of 32 MiB has a mapping of its own, with page faults in every step."""


@dataclass(frozen=True)
class Failure:
    """A run that raised. It has no result; the study continues without it."""

    run: StudyRun
    why: str
    """One line for a user error (MolsError), otherwise a traceback."""


@dataclass(frozen=True)
class Task:
    """Train a run; with `baseline`, measure the cost of its arm relative to that, both at these tuned settings."""

    run: StudyRun
    baseline: StudyRun | None = None


def perform(worker: Worker, task: Task) -> JsonObject:
    """Execute one task. Redirect its output to OUT/logs."""
    kind = "cost-" if task.baseline else ""
    with _logged(worker.store.out / "logs" / f"{kind}{worker.store.key(task.run)}.log", worker.rank):
        if task.baseline is None:
            return worker.execute(task.run)
        return measure(worker, task.baseline, task.run)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextlib.contextmanager
def _logged(path: Path, rank: int) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(path if rank == 0 else os.devnull, "a", encoding="utf-8", opener=_no_link) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        warnings.catch_warnings(),
    ):
        yield


def quiet_engines() -> None:
    """Hide messages of DeepSpeed and transformers below warnings. Draw no picture of a run's report."""
    from deepspeed.utils import logger
    from transformers.utils import logging as transformers_logging

    draw_no_plots()

    logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def start_alone() -> None:
    """Create a process group of one rank with an in-process store: no port that two processes could both choose."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    import deepspeed
    import torch.distributed
    from deepspeed.accelerator import get_accelerator

    check_kernel_caches()
    backend = get_accelerator().communication_backend_name()
    if get_accelerator().device_name() == "cpu":
        skip_shm_kernel()
        backend = "gloo"
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        deepspeed.init_distributed(backend)
    quiet_engines()


# ---------------------------------------------------------------------- processes of this machine


def _serve(connection: Connection, study: Study, out: Path, threads: int, parent: int) -> None:
    """Run one worker process: execute tasks from the pipe until it closes."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    start_alone()
    worker = Worker(study, Store(study, out))
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            connection.send((task, perform(worker, task), None))
        except MolsError as error:
            connection.send((task, None, " ".join(str(error).split())))
        except Exception:  # the study continues with other arms and reports the failure at the end
            connection.send((task, None, traceback.format_exc()))


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, for whatever reason."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


class Pool:
    """`jobs` processes that execute runs, until `close`."""

    def __init__(self, study: Study, store: Store, jobs: int) -> None:
        self.study, self.store = study, store
        spawn = multiprocessing.get_context("spawn")
        threads = int(os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs))))
        for name, value in KEEP_FREED.items():
            os.environ.setdefault(name, value)
        self.free: list[Connection] = []
        self.busy: dict[Connection, Task] = {}
        self.processes = []
        for _ in range(jobs):
            mine, theirs = spawn.Pipe()
            arguments = (theirs, study, store.out, threads, os.getpid())
            process = spawn.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.free.append(mine)

    def close(self) -> None:
        """End the workers. Runs in progress are lost."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()

    def run(self, wanted: Callable[[], list[Task]], done: Callable[[Task, JsonObject], None]) -> list[Failure]:
        """Execute the tasks of `wanted` until it returns no new ones. It is called again after every result."""
        failures: dict[Task, Failure] = {}
        while True:
            todo = [task for task in wanted() if task not in failures and task not in self.busy.values()]
            while todo and self.free:
                connection = self.free.pop()
                self.busy[connection] = todo.pop(0)
                connection.send(self.busy[connection])
            if not self.busy:
                return list(failures.values())
            for ready in multiprocessing.connection.wait(list(self.busy)):
                assert isinstance(ready, Connection)
                try:
                    task, result, failed = ready.recv()
                except EOFError as error:
                    lost = self.busy[ready]
                    name = f"the costs of {lost.run.label}" if lost.baseline else lost.run.label
                    raise MolsError(
                        f"the process that trained {name} was killed (out of memory?); finished "
                        "runs are kept: start the study again, with fewer --jobs if memory was short"
                    ) from error
                del self.busy[ready]
                self.free.append(ready)
                if failed is not None:
                    failures[task] = Failure(task.run, failed)
                else:
                    done(task, result)


# ---------------------------------------------------------------------- all ranks of a launched job


def together(
    worker: Worker, wanted: Callable[[], list[Task]], done: Callable[[Task, JsonObject], None]
) -> list[Failure]:
    """Execute the tasks of rank 0's `wanted` on every rank, one after the other. `done` is called on rank 0.

    Every rank raises the same MolsError, so the study continues without that run. Any other error ends the job.
    """
    failures: dict[Task, Failure] = {}
    while True:
        box: list[Any] = [None]
        if worker.rank == 0:
            box[0] = next((task for task in wanted() if task not in failures), None)
        torch.distributed.broadcast_object_list(box, src=0)
        task: Task | None = box[0]
        if task is None:
            return list(failures.values())
        try:
            result = perform(worker, task)
        except MolsError as error:
            failures[task] = Failure(task.run, " ".join(str(error).split()))
            continue
        if worker.rank == 0:
            done(task, result)


def runs_wanted(study: Study, store: Store) -> list[Task]:
    """Return the runs that can start now."""
    return [Task(run) for run in needed(study, store)[0]]
