"""The section `engine` of benchmarks/scale.py: a real DeepSpeed engine and the accumulator on one device, one process.

Written for a GPU. The goals there: the step after the calibration at most 1.005 of stock DeepSpeed's on a model of
350 M weights or more; no growth of the device's memory in a calibration with accumulators on the CPU; an update of the
accumulator at 70 % of the device's copy bandwidth or more. On a CPU the same code runs, without the memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import overhead
import torch
from rich.table import Table

from mols_ds.core.accumulators import Accumulators
from mols_ds.core.layout import ElementLayout
from mols_ds.core.ranges import ShardRange
from mols_ds.core.subsample import Subsample, choose

ARMS = ("stock", "fixed", "online")
VOCABULARY, SEQUENCE, WARMUP = 32_000, 128, 4
SEQUENCES = {"cuda": 16, "cpu": 1}
NUMEL = {"cuda": 1 << 28, "cpu": 1 << 25}
REPEATS = 11


def _engine(args: argparse.Namespace, arm: str, folder: str) -> Any:
    import mols_ds

    steps = WARMUP + args.rounds
    sections: dict[str, dict[str, Any]] = {
        "stock": {"enabled": False},
        "fixed": {"start": 0, "ramp_end": 1, "fixed_alphas": overhead.ALPHAS},
        "online": {"start": 0, "ramp_end": steps + 2, "samples": steps + 1, "mode": "online"},
    }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": SEQUENCES[args.device],
        "steps_per_print": 10**9,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "mols": sections[arm] | {"report_dir": os.path.join(folder, arm)},
    }
    if args.device == "cuda":
        config["bf16"] = {"enabled": True}
    shape = argparse.Namespace(model="llama", vocab=VOCABULARY, hidden=args.hidden, layers=args.layers)
    model = overhead.build_model(shape)
    return mols_ds.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def _step(engine: Any, batch: torch.Tensor, device: torch.device) -> tuple[float, int]:
    """(seconds of a step, peak of the device's memory above what was held when it began)."""
    cuda = device.type == "cuda"
    held = 0
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    begin = time.perf_counter()
    engine.backward(engine(input_ids=batch, labels=batch).loss)
    engine.step()
    if cuda:
        torch.cuda.synchronize(device)
    took = time.perf_counter() - begin
    return took, torch.cuda.max_memory_allocated(device) - held if cuda else 0


def _turns(args: argparse.Namespace, device: torch.device, folder: str) -> dict[str, Any]:
    """Steps of the arms in turns: seconds of each, peaks, and what the device holds more at the end than before."""
    engines = {arm: _engine(args, arm, folder) for arm in ARMS}
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    peaks = dict.fromkeys(ARMS, 0)
    generator = torch.Generator().manual_seed(0)
    held = 0
    for step in range(WARMUP + args.rounds):
        if step == WARMUP and device.type == "cuda":
            held = torch.cuda.memory_allocated(device)
        batch = torch.randint(0, VOCABULARY, (SEQUENCES[args.device], SEQUENCE), generator=generator).to(device)
        for turn in range(len(ARMS)):
            arm = ARMS[(turn + step) % len(ARMS)]
            took, peak = _step(engines[arm], batch, device)
            if step >= WARMUP:
                times[arm].append(took)
                peaks[arm] = max(peaks[arm], peak)
    assert engines["fixed"].mols.phase == "fixed" and engines["online"].mols.phase == "calibrating"
    grown = torch.cuda.memory_allocated(device) - held if device.type == "cuda" else 0
    elements = sum(parameter.numel() for parameter in engines["stock"].module.parameters())
    accumulators = engines["online"].mols.accumulator_bytes
    return {"times": times, "peaks": peaks, "grown": grown, "elements": elements, "accumulator_bytes": accumulators}


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def copy_over_update(device: torch.device) -> float:
    """Bandwidth of torch's copy_ (8 bytes an element) over that of an update (20), each at its fastest of REPEATS."""
    numel = NUMEL[device.type]
    gradient, target = torch.randn(numel, device=device), torch.empty(numel, device=device)
    owned, layouts = [ShardRange("w", 0, 0, numel)], {"w": ElementLayout.whole("vo")}
    kept = Subsample(*choose(owned, layouts, ("vo",)), device, torch.float32)
    moments = Accumulators(numel, device=device, kept=kept)

    def sample() -> None:
        moments.open()
        moments.update(0, gradient)
        moments.close()

    sample()
    copies, updates = [], []
    for _ in range(REPEATS):
        copies.append(8 * numel / _seconds(partial(target.copy_, gradient), device))
        updates.append(20 * numel / _seconds(sample, device))
    return max(copies) / max(updates)


def section(
    args: argparse.Namespace, say: Callable[[Any], None], verdict: Callable[..., Any]
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Rows and verdicts. Joins a process group of one."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.logger.setLevel("ERROR")
    # DeepSpeed would compile its shared-memory all-reduce for inference on a CPU, which takes a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="mols_scale_") as folder:
        os.environ.setdefault("LOCAL_RANK", "0")
        torch.distributed.init_process_group(
            get_accelerator().communication_backend_name() if device.type == "cuda" else "gloo",
            init_method=f"file://{folder}/store", rank=0, world_size=1,
        )  # fmt: skip
        deepspeed.init_distributed(auto_mpi_discovery=False)
        found = _turns(args, device, folder)
        torch.distributed.destroy_process_group()
    ratio = copy_over_update(device)
    rows, table = [], Table("arm", "median step, s", "ratio to stock", "quartiles", "peak over held, MiB")
    table.title = f"{args.device}: LLaMA of {found['elements']:,} weights, ZeRO-2, one process"
    for arm in ARMS:
        ratios = [a / b for a, b in zip(found["times"][arm], found["times"]["stock"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        peak = f"{found['peaks'][arm] / 2**20:,.1f}" if device.type == "cuda" else "not measured on a CPU"
        seconds = statistics.median(found["times"][arm])
        table.add_row(arm, f"{seconds:.4f}", f"{middle:.4f}", f"{low:.4f} to {high:.4f}", peak)
        rows.append({"arm": arm, "seconds": seconds, "ratio": middle, "peak_bytes": found["peaks"][arm]})
    say(table)
    verdicts = [
        verdict("step after the calibration over stock's", rows[1]["ratio"], 1.005, "time"),
        verdict("copy bandwidth over the accumulator update's", ratio, 1 / 0.7, "time"),
    ]
    if device.type == "cuda":
        more = max(found["peaks"]["online"] - found["peaks"]["stock"], found["grown"]) / 2**20
        verdicts.append(verdict("device memory that a calibration adds, MiB", more, 1.0, "memory"))
    return [*rows, {"accumulator_bytes": found["accumulator_bytes"], "copy_over_update": ratio}], verdicts
