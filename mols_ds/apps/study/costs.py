"""Cost of an arm relative to the baseline: step time, with both engines taking turns, and bytes of live tensors."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._pytree import tree_leaves

from mols_ds.apps.study.runs import StudyRun
from mols_ds.core.groups import is_scaled
from mols_ds.core.json_types import JsonObject

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from mols_ds.apps.study.work import Worker

ROUNDS, WARM_UP = 15, 4
HOW = "bytes of the live tensors of one rank: weights, gradients, optimizer state with fp32 copies; no activations"


def measure(worker: Worker, baseline: StudyRun, run: StudyRun) -> JsonObject:
    """Measure step time and memory of an arm relative to the baseline, at tuned settings and after the calibration.

    Both engines take turns on the same batches in one process, so a slower machine slows both. The result is the
    quartiles of the ratio within a round. Calibration steps are not included: their number is `probe_passes` of a run's
    result, their memory is `accumulators` here, in bytes.
    """
    runs = [baseline, run]
    engines = [_engine(worker, one) for one in runs]
    job = worker.job(baseline, worker.store.out / "running" / "costs")
    seconds: list[list[float]] = [[], []]
    for round_ in range(WARM_UP + ROUNDS):
        batches = [ids.to(engines[0].device) for ids in job.batches.step("train", round_)]
        order = (0, 1) if round_ % 2 == 0 else (1, 0)
        for i in order:
            seconds[i].append(_step(engines[i], batches))
    memory = [live_bytes(engine, batches) for engine in engines]
    ratios = [b / a for a, b in zip(*seconds, strict=True)][WARM_UP:]
    low, _, high = statistics.quantiles(ratios, n=4)
    for engine in engines:
        engine.mols.detach()
        engine.destroy()
    del engines
    gc.collect()
    return {
        "step_ratio": [statistics.median(ratios), low, high],
        "step_seconds": statistics.median(seconds[1][WARM_UP:]),
        "memory_bytes": memory[1],
        "memory_ratio": memory[1] / memory[0],
        "memory_how": HOW,
        "accumulators": _accumulators(worker, run),
    }


def _engine(worker: Worker, run: StudyRun, *, calibrating: bool = False) -> DeepSpeedEngine:
    """Build the engine of this run's arm. With MoLS: use the run's alphas, or start calibrating."""
    import mols_ds

    out = worker.store.out / "running" / "costs"
    config = worker.config(run, out)
    if "mols" in config and not calibrating:
        result = worker.store.load(run) or {}
        alphas = {group: alpha for group, alpha in result.get("alphas", {}).items() if is_scaled(group)}
        keep = {key: config["mols"][key] for key in ("rules", "granularity", "report_dir") if key in config["mols"]}
        config["mols"] = {
            **keep,
            "fixed_alphas": alphas,
            "start": 0,
            "ramp_end": 1,
            "total_steps": worker.study.at(run.model).steps,
        }
    elif "mols" in config:
        config["mols"] |= {"start": 0}
    _, tokenizer, _ = worker.tokens(run.model)
    model = worker.model(run, config, tokenizer)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = mols_ds.initialize(model=model, model_parameters=trainable, config=config)
    engine.train()
    return engine


def _step(engine: DeepSpeedEngine, batches: Iterable[torch.Tensor]) -> float:
    get_accelerator().synchronize()
    began = time.perf_counter()
    for ids in batches:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    get_accelerator().synchronize()
    return time.perf_counter() - began


def _accumulators(worker: Worker, run: StudyRun) -> int:
    """Return the bytes of this rank's accumulators during the calibration; 0 without one."""
    section = worker.config(run, worker.store.out).get("mols")
    if section is None or section.get("mode") == "moments" or section.get("fixed_alphas"):
        return 0
    engine = _engine(worker, run, calibrating=True)
    job = worker.job(run, worker.store.out / "running" / "costs")
    held = 0
    for step in range(2):
        _step(engine, [ids.to(engine.device) for ids in job.batches.step("train", step)])
        held = max(held, int(engine.mols.accumulator_bytes))
    engine.mols.detach()
    engine.destroy()
    gc.collect()
    return held


def live_bytes(engine: DeepSpeedEngine, batches: list[torch.Tensor]) -> int:
    """Return the bytes of this rank's weights, gradients (after backward) and optimizer state, each storage once."""
    *head, last = batches
    _step(engine, head)
    engine.backward(engine(input_ids=last, labels=last).loss)
    outer = engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    parameters = list(engine.module.parameters())
    held: list[object] = [parameters, [getattr(parameter, "ds_tensor", None) for parameter in parameters]]
    held += [[group["params"] for group in inner.param_groups], list(inner.state.values())]
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "averaged_gradients"):
        held.append(getattr(outer, name, None))
    tensors = [leaf for leaf in tree_leaves(held) if isinstance(leaf, torch.Tensor)]
    storages: dict[int, int] = {}
    for tensor in tensors:  # grows: the parts of a tensor that has parts, and gradients
        if hasattr(tensor, "__tensor_flatten__"):
            tensors += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
            continue
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        if tensor.is_leaf and tensor.grad is not None:
            tensors.append(tensor.grad)
    engine.step()
    return sum(storages.values())
