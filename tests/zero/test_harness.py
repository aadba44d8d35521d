"""The launcher of gloo ranks: results by rank and case, failures told by rank, a hang ended."""

from __future__ import annotations

import time

import pytest
import torch

from tests.harness import RankError, run_cases, run_ranks

HANG_LIMIT = 4.0  # seconds; the case sleeps far longer


def all_sum(value: int) -> tuple[int, int]:
    total = torch.tensor(float(value * (1 + torch.distributed.get_rank())))
    torch.distributed.all_reduce(total)
    return torch.distributed.get_rank(), int(total)


def misbehave(what: str) -> str:
    if what == "raise" and torch.distributed.get_rank() == 1:
        raise ValueError("rank one says no")
    if what == "raise":
        torch.distributed.barrier()
    if what == "hang":
        time.sleep(600)
    return what


def test_one_value_a_rank() -> None:
    assert run_ranks(all_sum, 2, 5) == [(0, 15), (1, 15)]


def test_cases_behind_a_failure_and_a_hang_still_run() -> None:
    results = run_cases(misbehave, 2, [("a",), ("raise",), ("b",), ("hang",), ("c",)], timeout=HANG_LIMIT)
    assert [results[case,] for case in "abc"] == [["a", "a"], ["b", "b"], ["c", "c"]]
    with pytest.raises(RankError, match=r"\[rank 1, status 1\] ValueError: rank one says no"):
        results["raise",]
    with pytest.raises(RankError, match="no result within 4 s"):
        results["hang",]
