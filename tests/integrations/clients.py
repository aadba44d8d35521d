"""Every client of the table: how its runs are made."""

from __future__ import annotations

import functools
import importlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mols_ds
from tests.apps.command import SHIM, run
from tests.helpers.ports import free_port
from tests.integrations import own_loop
from tests.integrations.places import Seen, Train, runs_of
from tests.integrations.runs import ONLINE, Run

TRAINERS = {
    "Trainer": ("trainer", False),
    "SFTTrainer": ("sft", False),
    "SFTTrainer, LoRA": ("sft", True),
    "DPOTrainer": ("dpo", False),
    "DPOTrainer, LoRA": ("dpo", True),
}
LAUNCHERS: dict[str, tuple[str | Path, ...]] = {
    "`deepspeed --config`": (SHIM,),
    "`mols-ds launch`": ("mols-ds", "launch"),
}
SHARDED = "Lightning, FSDP2"
CLIENTS = (*TRAINERS, "Accelerate", "Lightning", "`mols_ds.patch()`", "`mols_ds.attach`", *LAUNCHERS)
"""Clients of DeepSpeed."""
WITHOUT_DEEPSPEED = {"Trainer": (1, 2), "Accelerate": (1, 2), "Lightning": (1, 2), SHARDED: (2,)}
"""Client -> numbers of ranks."""
EXTRA = (*TRAINERS, "Lightning", SHARDED)
"""Clients that measure on extra batches: no checkpoint can be saved in a window of mode "probe"."""


def by_patch(run: Run) -> Seen:
    """`mols_ds.patch()` and a loop of the user's own."""
    mols_ds.patch()
    try:
        return own_loop.train(run)
    finally:
        mols_ds.unpatch()


def by_attach(run: Run) -> Seen:
    """`mols_ds.attach` on the engine of a stock `deepspeed.initialize`."""

    def build(run: Run) -> Any:
        engine = own_loop.initialize(Run(run.stage, None, run.out))
        if run.section is not None:
            mols_ds.attach(engine, run.section)
        return engine

    return own_loop.train(run, build)


def train_of(client: str) -> Train:
    """The function that makes a run of this client, in this process."""
    if client in TRAINERS:
        trainers = importlib.import_module("tests.integrations.trainers")
        return functools.partial(trainers.train_run, *TRAINERS[client])
    own: dict[str, Train] = {"`mols_ds.patch()`": by_patch, "`mols_ds.attach`": by_attach}
    if client in own:
        return own[client]
    if client == SHARDED:
        return functools.partial(importlib.import_module("tests.integrations.lightning_fit").train, way="fsdp2")
    module = {"Accelerate": "accelerate_loop", "Lightning": "lightning_fit"}[client]
    found: Train = importlib.import_module(f"tests.integrations.{module}").train
    return found


_wholes: dict[tuple[str, int], dict[str, Seen]] = {}
"""(client, stage) -> its runs to the end, in this process."""


def at_place(client: str, stage: int, part: str) -> Seen:
    """On a rank: the runs of a part of the table."""
    window = ONLINE if client in EXTRA else {}
    return runs_of(train_of(client), stage, part, _wholes.setdefault((client, stage), {}), window)


def launched(client: str, world: int, stage: int, parts: Sequence[str], folder: Path) -> list[dict[str, Seen]]:
    """The same by a launcher, which starts a stock script: the runs of several parts, one value a rank."""
    config = own_loop.ds_config(Run(stage, {}, ""))
    (folder / "ds.json").write_text(json.dumps(config), "utf-8")
    script = Path(own_loop.__file__)
    ranks = ("--num_accelerators", str(world), "--master_port", str(free_port()))
    done = run(*LAUNCHERS[client], *ranks, "--config", "ds.json", script, "--parts", ",".join(parts), cwd=folder)
    if done.status:
        raise AssertionError(f"{client}: status {done.status}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return [pickle.loads((folder / f"seen.{rank}.pkl").read_bytes()) for rank in range(world)]
