"""Shared by the checkpoint tests: a tiny run with short phases, and all state that it continues with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.engines.deepspeed.engines import MICROS, config, engine_of
from tests.engines.deepspeed.models import TOKENS, Tiny
from tests.engines.deepspeed.state import NOT_SAVED, snapshot
from tests.helpers.oracle.models import groups_of

# Elements, at stage 3: several sub-groups, and norms that stay whole.
SIZES = {"sub_group_size": 400, "stage3_param_persistence_threshold": 20}
DECAY, RATES = 0.1, (2e-2, 5e-2)  # of the matrices; of the matrices and of the vectors
SAMPLES = 10  # one sample block is full (8), the next is open
START = 2
RAMP_END = {"probe": 5, "online": 15, "moments": 15}  # a probe window ends at the step at which it began
EVERY = 4


def section(mode: str = "probe", **more: Any) -> dict[str, Any]:
    """A "mols" section whose phases are over within 30 iterations."""
    return {
        "mode": mode,
        "start": START,
        "samples": SAMPLES,
        "ramp_end": RAMP_END[mode],
        "noise_floor_correction": False,  # of so few samples of so small a model most groups would be clamped
        "estimator": "mean",
        "report_dir": "report",
        **more,
    }


def rate(step: int) -> float:
    """The scheduler's factor on every base rate for step `step`: a warm-up, then a decay."""
    return float(min((step + 1) / 4, 1.0) * 0.98**step)


def tiny_engine(
    stage: int,
    mols: Mapping[str, Any] | None,
    *,
    precision: str = "fp32",
    initialize: Callable[..., Any] | None = None,
    zero: Mapping[str, Any] | None = None,
    universal: bool = False,
) -> Any:
    """A fresh engine: AdamW with two parameter groups of different rate and decay, and a scheduler."""
    torch.manual_seed(1)
    model = Tiny()
    loading = {"checkpoint": {"load_universal": True}} if universal else {}
    sizes = SIZES if stage == 3 else {}
    settings = config(stage, mols, precision=precision, zero={**sizes, **(zero or {})}, **loading)
    optimizer = torch.optim.AdamW(groups_of(model, *RATES, DECAY))
    return engine_of(settings, model, optimizer, initialize=initialize, schedule=rate)


def iterate_tiny(engine: Any, iteration: int, *, broken: bool = False) -> None:
    """One pass of a user's loop. `broken`: the loss of rank 0 is NaN."""
    for micro in range(MICROS):
        generator = torch.Generator().manual_seed(10_000 * iteration + 100 * micro + dist.get_rank())
        tokens = (torch.rand(2, 9, generator=generator) ** 3 * TOKENS).long()
        loss = engine(tokens)
        engine.backward(loss * float("nan") if broken and dist.get_rank() == 0 else loss)
        engine.step()


def engine_part(engine: Any) -> dict[str, Any]:
    """What of an engine a bit-for-bit resumed run must have in common with this one."""
    return {key: value for key, value in snapshot(engine).items() if key not in NOT_SAVED}


def fingerprint(engine: Any) -> dict[str, Any]:
    """As `engine_part`, with the state of MoLS."""
    mols = engine.mols
    return {
        **engine_part(engine),
        "phase": (mols.phase, mols.samples, mols.accumulator_bytes),
        "alphas": mols.alphas,
        "report": json.dumps(mols.report()),
        "applied": (mols.multipliers, mols.applied_lrs),
    }


def until(engine: Any, iteration: int, reached: Callable[[Any], bool], limit: int = 40) -> int:
    """Iterate until `reached(engine.mols)`; returns the number of the next iteration."""
    while not reached(engine.mols):
        assert iteration < limit, engine.mols.phase
        iterate_tiny(engine, iteration)
        iteration += 1
    return iteration


def side_files(folder: str | Path) -> list[str]:
    """Our files of one tag, after every rank has got here."""
    dist.barrier()
    names = sorted(path.name for path in Path(folder).glob("*mols*"))
    dist.barrier()
    return names
