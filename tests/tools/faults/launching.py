"""One launch of all ranks, watched as a launcher does: who ended how, and how long after the fault the last one did."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.harness import RANK_ENVIRONMENT, _Launch, _rank_environment  # what `run_cases` is made of
from tests.tools.faults.engines import ENGINES, Order, launch
from tests.tools.faults.faults import fired

TIMEOUT = {"stop": 20}
"""Seconds a collective waits, by fault: a stopped rank is found out by nothing else. On a busy machine the ranks of a
run without a fault wait for each other for seconds, too."""
OTHERWISE = 60
SLACK_SECONDS = 20.0
"""From the end of that time to that of the last rank: its traceback, on a machine that runs other work."""
LAUNCH_SECONDS = 150.0
_POLL_SECONDS = 0.05
ENVIRONMENT: Mapping[str, str] = {
    "RANKS_JOIN": "0",  # the jobs join the ranks themselves, with a time limit
    "RANKS_PRELOAD": "mols_ds.training.trainer mols_ds.training.deepspeed_backend mols_ds.training.ds_config "
    "mols_ds.apps.train_megatron.main megatron_patches.cpu.emulation "
    "megatron.core.dist_checkpointing.strategies.torch megatron.core.optimizer megatron.core.datasets.gpt_dataset "
    "megatron.core.models.gpt.gpt_layer_specs tests.tools.faults.engines "
    "tests.engines.deepspeed.resume tests.engines.megatron.state",
}


@dataclass
class Launched:
    """What came of a launch. `values`: what each rank returned, where all did; `hung`: ranks that had to be killed."""

    statuses: list[int | None]
    values: list[dict[str, Any]] = field(default_factory=list)
    hung: list[int] = field(default_factory=list)
    seconds: float = 0.0
    after_fault: float | None = None
    story: str = ""

    @property
    def ended_well(self) -> bool:
        return bool(self.values) and all(self.values)


def run_launch(order: Order) -> Launched:
    """Start the ranks and wait until all have ended, except a stopped one. Ends no rank."""
    engine = ENGINES[order.engine]
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        started = _Launch(Path(folder), launch, engine.world, [(order,)], _rank_environment(ENVIRONMENT))
        began = time.monotonic()
        try:
            started._start()
            hung = _watch(started, order, began)
            ended = time.monotonic()
            statuses = [rank.poll() for rank in started.ranks]
        finally:
            for rank in started.ranks:
                rank.end()
        result = Launched(statuses, hung=hung, seconds=ended - began)
        if started._finished():
            result.values = [started._value(0, rank) for rank in range(engine.world)]
        result.story = started._story(0)
        mark = fired(order.fault.mark) if order.fault is not None else None
        result.after_fault = None if mark is None else ended - mark
        return result


def _watch(started: _Launch, order: Order, began: float) -> list[int]:
    """Wait for the ranks; returns those that ran on when the time was up, and were not stopped by the fault."""
    fault = order.fault
    stopped = set(fault.ranks) if fault is not None and fault.kind == "stop" else set()
    while True:
        running = [number for number, rank in enumerate(started.ranks) if rank.poll() is None]
        mark = fired(fault.mark) if fault is not None else None
        waited_for = [number for number in running if mark is None or number not in stopped]
        if not waited_for:
            return []
        failed = any(rank.status not in (None, 0) for rank in started.ranks)
        limit = began + LAUNCH_SECONDS
        if mark is not None and (failed or stopped):
            limit = min(limit, mark + order.timeout + SLACK_SECONDS)
        if time.monotonic() > limit:
            started._dump_stacks()
            return waited_for
        time.sleep(_POLL_SECONDS)


def quiet_environment() -> None:
    """This process's own settings, which the ranks inherit, before torch is imported."""
    os.environ.update({key: value for key, value in RANK_ENVIRONMENT.items() if key not in os.environ})
