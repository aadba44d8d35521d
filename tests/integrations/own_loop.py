"""A training loop over `deepspeed.initialize`, as users write one; of MoLS it knows that `engine.mols` may be there.

    deepspeed --config ds.json tests/integrations/own_loop.py --parts counts,waiting     # what the shim starts

As a script it writes `seen.RANK.pkl`: what `places.runs_of` found, by part.
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from mols_ds.training.ranks import leave_ranks
from tests.integrations.runs import (
    LR,
    SAMPLES,
    SAVED,
    START,
    STEPS,
    WARMUP,
    Examples,
    Run,
    end_of,
    model,
    phase_of,
    saved_in,
    zero_section,
)

MICROS = 2
WINDOW = range(START, START + SAMPLES)
"""Iterations, from 0, that mode "probe" measures and discards."""
SAVE = {part: update if update <= START else update + SAMPLES for part, update in SAVED.items()} | {"window": START + 2}
"""When a checkpoint is saved -> after how many iterations."""


def ds_config(run: Run) -> dict[str, Any]:
    """The DeepSpeed config, with the run's "mols" section."""
    schedule = {"warmup_min_lr": 0.0, "warmup_max_lr": LR, "warmup_num_steps": WARMUP, "total_num_steps": STEPS}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICROS,
        "gradient_clipping": 1.0,
        "zero_optimization": zero_section(run.stage),
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}},
        "scheduler": {"type": "WarmupDecayLR", "params": {**schedule, "warmup_type": "linear"}},
        "steps_per_print": 10**9,
    }
    return config if run.section is None else {**config, "mols": run.section}


def initialize(run: Run, **arguments: Any) -> Any:
    """The engine."""
    torch.manual_seed(3)
    net = model()
    given = arguments or {"config": ds_config(run)}
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), **given)
    return engine


def train(run: Run, build: Callable[[Run], Any] = initialize) -> dict[str, Any]:
    """STEPS updates. A run without MoLS is given the batches that one with MoLS trains with."""
    engine, iteration = build(run), 0
    rows, rank, world = Examples().rows, dist.get_rank(), dist.get_world_size()
    counts, lrs, phases, logs, evaluations = [], [], [], [], []
    saved = {}
    if run.resume is not None:
        _, state = engine.load_checkpoint(run.saved, tag=run.resume)
        iteration = state["iteration"]
    while engine.global_steps < STEPS:
        lr, before = float(engine.get_lr()[0]), engine.global_steps
        if run.section is not None or iteration not in WINDOW:
            for micro in range(MICROS):
                batch = rows[((MICROS * iteration + micro) * world + rank) % len(rows)][None]
                engine.backward(engine(input_ids=batch, labels=batch).loss)
                engine.step()
        iteration += 1
        if engine.global_steps > before:
            counts.append((engine.global_steps, engine.micro_steps))
            lrs.append(lr)
            phases.append(phase_of(engine))
            logs.append({"update": engine.global_steps, "lr": lr, **rates(engine)})
            if engine.global_steps % 3 == 0:
                evaluations.append(evaluate(engine, rows[0][None]))
        for part, stop in SAVE.items():
            if run.save and iteration == stop:
                saved[part] = saved_in(engine, engine.global_steps)
                engine.save_checkpoint(run.out, tag=part, client_state={"iteration": iteration})
    found = {"counts": counts, "lrs": lrs, "phases": phases, "logs": logs, "saved": saved, **end_of(engine)}
    return {**found, "same": {"evaluations": evaluations, "iterations": iteration}}


def rates(engine: Any) -> dict[str, float]:
    """What a loop without our keys can log: multipliers, rates and alphas, from `engine.mols`."""
    if not hasattr(engine, "mols"):
        return {}
    mols, found = engine.mols, {}
    for kind, values in (("multiplier", mols.multipliers), ("lr", mols.applied_lrs), ("alpha", mols.alphas)):
        found |= {f"mols/{kind}/{group}": value for group, value in values.items()}
    measured = mols.report().get("groups", {})
    return found | {f"mols/snr/{group}": row["snr"] for group, row in measured.items() if row["snr"] is not None}


def evaluate(engine: Any, batch: torch.Tensor) -> float:
    """Loss of held-out data."""
    engine.eval()
    with torch.no_grad():
        loss = float(engine(input_ids=batch, labels=batch).loss)
    engine.train()
    return loss


def main() -> None:
    """What the launchers start."""
    from tests.integrations.places import runs_of

    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--parts", required=True)
    deepspeed.add_config_arguments(parser)
    args = parser.parse_args()
    deepspeed.init_distributed("gloo")
    config = json.loads(Path(args.deepspeed_config).read_text("utf-8"))

    def build(run: Run) -> Any:
        return initialize(run, args=args) if ds_config(run) == config else initialize(run)

    stage, wholes = config["zero_optimization"]["stage"], {}
    seen = {part: runs_of(lambda run: train(run, build), stage, part, wholes, {}) for part in args.parts.split(",")}
    Path(f"seen.{dist.get_rank()}.pkl").write_bytes(pickle.dumps(seen))
    leave_ranks()


if __name__ == "__main__":
    main()
