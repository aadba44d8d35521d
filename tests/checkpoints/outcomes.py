"""Runs that continue from the fixtures, once per test session; tests/contracts also checks the programs' metrics."""

from __future__ import annotations

import functools

from tests.checkpoints import deepspeed_runs, job_runs, megatron_runs
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

WORLD = 2
POINTS = ("waiting", "calibrating", "calibrating-online", "ramping", "fixed")
DEEPSPEED = Cases(
    [f"zero{stage}-{point}" for stage in (0, 1, 2, 3) for point in POINTS],
    quick=[f"zero{stage}-calibrating" for stage in (0, 1, 2, 3)],
)
MEGATRON = Cases(
    [f"megatron-{grid}-{point}" for grid in ("dp2", "tp2") for point in POINTS], quick=["megatron-tp2-calibrating"]
)
JOBS = ["job-train", "job-train_megatron"]
FINETUNE = "finetune"  # no fixture: it is the same loop as train.py's


@functools.cache
def deepspeed_outcomes() -> Results:
    return run_cases(deepspeed_runs.continued, WORLD, [(name,) for name in DEEPSPEED.wanted])


@functools.cache
def megatron_outcomes() -> Results:
    return run_cases(megatron_runs.continued, WORLD, [(name,) for name in MEGATRON.wanted])


@functools.cache
def job_outcomes() -> Results:
    return run_cases(job_runs.job, WORLD, [(name,) for name in (*JOBS, FINETUNE)])
