"""Train a tiny GPT model on Megatron-core from a `settings.json`: write a fixture, or continue from one.

Model, data and loop are those of tests/engines/megatron/building.py; the settings write out every option of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_patches import cpu_megatron
from tests.checkpoints.comparing import FIXTURES, read, weight_sums
from tests.engines.megatron.building import Setup, mean_loss
from tests.engines.megatron.running import Run
from tests.helpers.harness import draw_nothing

CHECKPOINT = "checkpoint"
SEED_OF_WRITER, SEED_OF_READER = 5, 77

draw_nothing()


def run_of(settings: dict[str, Any]) -> Run:
    """Model, optimizer, scheduler and MoLS."""
    return Run(Setup(**settings["setup"]), settings["mols"], settings["way"], **settings["optimizer"])


def state_of(run: Run) -> dict[str, Any]:
    """What a user sees of MoLS after an iteration."""
    mols: Any = run.mols
    return {
        "phase": mols.phase,
        "samples": mols.samples,
        "steps": mols.steps,
        "accumulators": mols.accumulator_bytes > 0,
        "alphas": mols.alphas,
        "multipliers": mols.multipliers,
        "applied_lrs": mols.applied_lrs,
    }


def weights_of(run: Run) -> dict[str, dict[str, float]]:
    """Sums of every rank's part of every weight."""
    mine = {
        f"rank {dist.get_rank()} {name}": weight_sums(parameter)
        for chunk in run.built.chunks
        for name, parameter in chunk.named_parameters()
    }
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return {name: sums for rank in ranks for name, sums in rank.items()}


def written(folder: str, settings_json: str, points: tuple[tuple[str, int], ...]) -> dict[str, str]:
    """Train from the first step and save after each iteration that `points` names; returns the phase at each."""
    settings, phases = json.loads(settings_json), {}
    names = {iteration: name for name, iteration in points}
    with cpu_megatron(fused_adam=True), run_of(settings) as run:
        torch.manual_seed(SEED_OF_WRITER)
        for iteration in range(max(names) + 1):
            run.iterate(iteration)
            if (name := names.get(iteration)) is not None:
                run.save(f"{name}/{CHECKPOINT}", settings["sharding"])  # the path is in the files: a relative one
                if dist.get_rank() == 0:
                    shutil.copytree(name, Path(folder, name))
                phases[name] = run.mols.phase
    return phases


def continued(name: str, folder: str | None = None) -> dict[str, Any]:
    """Load a fixture into a new run and continue training; returns this rank's part of `expected.json`."""
    settings, trace = read(name, "settings.json"), []
    with cpu_megatron(fused_adam=True), run_of(settings) as run:
        with torch.no_grad():  # the checkpoint has to bring the weights
            for chunk in run.built.chunks:
                for parameter in chunk.parameters():
                    parameter.zero_()
        warned = run.load(folder or str(FIXTURES / name / CHECKPOINT), settings["sharding"])
        loaded = state_of(run)
        torch.manual_seed(SEED_OF_READER)  # a window of mode "probe" must replace this by the writer's state
        for more in range(1, settings["iterations"] + 1):
            stepped = run.iterate(settings["saved_after_iteration"] + more)
            trace.append({"loss": mean_loss(stepped), **state_of(run)})
        report, weights, drawn = run.mols.report(), weights_of(run), torch.rand(3).tolist()
    return {"loaded": loaded, "warned": warned, "trace": trace, "report": report, "weights": weights, "random": drawn}
