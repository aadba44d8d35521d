"""The launcher of gloo ranks: results by rank and case, failures by rank, no leftovers, fresh ranks."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.helpers.harness import ROOT, RankError, run_cases, run_ranks

HANG_LIMIT = 10.0  # seconds, in which the other cases must end on a busy machine; the hanging one sleeps far longer
LONG = 600
WAIT = 120.0  # seconds for what takes ten on an idle machine


def all_sum(value: int) -> tuple[int, int]:
    total = torch.tensor(float(value * (1 + torch.distributed.get_rank())))
    torch.distributed.all_reduce(total)
    return torch.distributed.get_rank(), int(total)


def misbehave(what: str, folder: str = "") -> str:
    rank = torch.distributed.get_rank()
    if what == "raise" and rank == 1:
        raise ValueError("rank one says no")
    if what == "crash" and rank == 1:
        os.write(2, b"last words\n")
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "leave" and rank == 1:
        os._exit(7)
    if what in ("raise", "crash", "leave"):
        torch.distributed.barrier()
    if what == "hang":
        child = subprocess.Popen(["sleep", str(LONG)])
        for name, process in (("rank", os.getpid()), ("server", os.getppid()), ("child", child.pid)):
            Path(folder, f"{name}.{rank}").write_text(str(process))
        Path(folder, "ready").touch()
        time.sleep(LONG)
    return what


def hang(folder: str) -> str:
    return misbehave("hang", folder)


def look() -> dict[str, Any]:
    """State that a rank owns, and that it shares."""
    return {
        "server": os.getppid(),
        "session": os.getsid(0) == os.getpid(),
        "folder": os.getcwd(),
        "hash": hash("the same string"),
        "draws": (random.random(), float(numpy.random.rand()), float(torch.rand(()))),
        "variables": {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "OF_THIS_TEST")},
        "path": [entry for entry in sys.path if entry],
    }


def alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < limit, "not within the time limit"
        time.sleep(0.1)


def noted(folder: Path, kind: str) -> list[int]:
    """The processes of a kind that hanging ranks wrote down."""
    return [int(file.read_text()) for file in folder.glob(f"{kind}.*")]


def test_one_value_a_rank() -> None:
    assert run_ranks(all_sum, 2, 5) == [(0, 15), (1, 15)]


@pytest.mark.tier("all")
def test_cases_behind_failures_and_a_hang_still_run(tmp_path: Path) -> None:
    hanging = ("hang", str(tmp_path))
    cases = [("a",), ("raise",), ("b",), hanging, ("crash",), ("c",), ("leave",)]
    results = run_cases(misbehave, 2, cases, timeout=HANG_LIMIT)
    assert [results[case,] for case in "abc"] == [["a", "a"], ["b", "b"], ["c", "c"]]
    with pytest.raises(RankError, match=r"\[rank 1, status 1\] ValueError: rank one says no"):
        results["raise",]
    with pytest.raises(RankError, match=r"\[rank 1, status -9\] last words"):
        results["crash",]
    with pytest.raises(RankError, match=r"a rank failed"):
        results["leave",]
    with pytest.raises(RankError, match=r"no result within 10 s(.|\n)*in misbehave"):
        results[hanging]
    left = [*noted(tmp_path, "rank"), *noted(tmp_path, "child")]
    assert len(left) == 4 and not any(map(alive, left)), "a hanging rank is killed with its children"
    assert all(map(alive, noted(tmp_path, "server")))


@pytest.mark.tier("all")
def test_ranks_are_like_freshly_started_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = run_ranks(look, 2), run_ranks(look, 4)
    assert [seen["server"] for seen in first] == [seen["server"] for seen in second[:2]], "servers are kept"
    ranks = [*first, *second]
    assert all(seen["session"] for seen in ranks)
    assert first[0]["folder"] == first[1]["folder"] != second[0]["folder"]
    for position in range(3):  # of random, numpy and torch
        assert len({seen["draws"][position] for seen in ranks}) == len(ranks)
    for one, other in ((0, 1), (2, 3), (0, 2), (1, 3)):  # tensor- and pipeline-parallel partners, say
        assert second[one]["hash"] != second[other]["hash"]

    monkeypatch.setenv("OF_THIS_TEST", "from the caller")
    (seen,) = run_ranks(look, 1, environment={"PYTHONPATH": "/of/this/test"})
    assert seen["variables"] == {"RANK": "0", "WORLD_SIZE": "1", "OF_THIS_TEST": "from the caller"}
    path = seen["path"]
    assert path.index(str(ROOT)) < path.index("/of/this/test") < path.index(str(Path(torch.__file__).parent.parent))


@pytest.mark.tier("all")
def test_an_import_that_fails_in_the_servers_is_told(tmp_path: Path) -> None:
    (tmp_path / "pytest.py").write_text("raise ImportError('broken on purpose')")
    with pytest.raises(RuntimeError, match="broken on purpose"):
        run_ranks(look, 1, environment={"PYTHONPATH": str(tmp_path)})


@pytest.mark.tier("all")
@pytest.mark.parametrize("victim", ["test run", pytest.param("server", marks=pytest.mark.tier("full"))])
def test_a_killed_parent_leaves_nothing_behind(tmp_path: Path, victim: str) -> None:
    call = f"run_ranks(hang, 1, {str(tmp_path)!r})"
    code = f"from tests.helpers.harness import run_ranks; from tests.helpers.test_harness import hang; {call}"
    with open(tmp_path / "log", "wb") as log:
        run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for((tmp_path / "ready").exists)
        started = [process for kind in ("server", "rank", "child") for process in noted(tmp_path, kind)]
        assert len(started) == 3 and all(map(alive, started))
        os.kill(run.pid if victim == "test run" else started[0], signal.SIGKILL)
        run.wait(WAIT)
        wait_for(lambda: not any(map(alive, started)))
    finally:
        run.kill()
        run.wait()
    if victim == "server":
        assert "the fork server is gone" in (tmp_path / "log").read_text()
