"""Does MoLS help? Final validation loss of Adam and of Adam+MoLS, each at its own best base rate, over several seeds.

    python benchmarks/convergence.py --jobs 2 --out runs/convergence

A LLaMA of 1.12 M weights learns the Python standard library's own source, fp32, in a DeepSpeed ZeRO stage 1 engine of
one rank. First every arm runs a grid of base rates with one seed; an arm whose best rate is at the edge gets more rates
on that side. Then every arm runs all seeds at its best rate. A seed sets the initial weights and the order of the data,
alike for every arm, so arms are compared in pairs.

MoLS measures in its default mode, "probe", on the 32 batches that come next in training and are then trained on. So all
arms train on the same tokens in the same order, and no arm sees a token that another does not. What MoLS costs extra is
32 forward and backward passes.

Each finished run is one JSON file in OUT/runs; a benchmark that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from convergence_tables import markdown, summarise

from mols_ds.batches import BatchShape, PackedBatches, sequences
from mols_ds.data import DataSpec
from mols_ds.tokens import TokenData, Tokenizer, prepare

BASE = "adam"
# The robust arms spell their settings out, so that a changed default does not silently change what is measured.
_ROBUST = {"preset": "robust", "noise_floor_correction": True, "reference": "vo", "alpha_min": 0.1, "alpha_max": 10.0}
ARMS: dict[str, dict[str, Any]] = {
    BASE: {"enabled": False},
    # Uncorrected: at batches this small the corrected median of a group with little signal lies below its noise floor.
    "median-uncorrected": {**_ROBUST, "estimator": "median", "noise_floor_correction": False},
    **{name: {**_ROBUST, "estimator": name} for name in ("damping", "pooled", "mean")},
    "paper": {"preset": "paper"},
    "damping-uncorrected": {**_ROBUST, "estimator": "damping", "noise_floor_correction": False},
    "median": {**_ROBUST, "estimator": "median"},
    "damping-early": {**_ROBUST, "estimator": "damping", "start": 2},
    "median-uncorrected-early": {**_ROBUST, "estimator": "median", "noise_floor_correction": False, "start": 2},
}
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (0, 1, 2, 3, 4)
SPLIT_SEED = 0
"""Which documents are held out: the same ones for every seed."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One experiment. Lengths in tokens, times in steps; warm-up, calibration and ramp follow from `steps`."""

    steps: int = 200
    vocabulary: int = 2048
    hidden: int = 128
    intermediate: int = 344
    layers: int = 3
    heads: int = 4
    length: int = 128
    sequences: int = 16
    held_out_tokens: int = 65_536
    source: str = "stdlib"
    held_out_share: float = 0.02

    @property
    def warmup(self) -> int:
        """10 % of the steps, as in the paper."""
        return max(2, self.steps // 10)

    @property
    def calibration(self) -> dict[str, Any]:
        """When MoLS measures: at 5 % of the steps. The paper's 1 % would be step 2 here, where weights are random."""
        return {
            "mode": "probe",
            "start": max(1, self.steps // 20),
            "samples": 32,
            "ramp": "linear",
            "ramp_end": self.warmup,
        }


SMOKE = Settings(20, 320, 32, 64, 2, 2, length=32, sequences=4, held_out_tokens=2048, held_out_share=0.1)


@dataclass(frozen=True, slots=True, order=True)
class Run:
    """One training: which arm, base rate and seed."""

    arm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """File name without suffix, such as median-0.004-0."""
        return f"{self.arm}-{self.rate:g}-{self.seed}"


@dataclass(slots=True)
class Bench:
    """Where runs are kept, and how many processes train."""

    settings: Settings
    out: Path
    jobs: int

    def file(self, run: Run) -> Path:
        """Result file of a run; its name changes with every setting that the result depends on."""
        calibration = {} if run.arm == BASE else self.settings.calibration
        state = json.dumps([asdict(self.settings), calibration | ARMS[run.arm]], sort_keys=True)
        return self.out / "runs" / f"{run.name}-{hashlib.blake2b(state.encode(), digest_size=4).hexdigest()}.json"

    def load(self, run: Run) -> dict[str, Any]:
        """Result of a finished run."""
        result: dict[str, Any] = json.loads(self.file(run).read_text("utf-8"))
        return result

    def done(self, run: Run) -> bool:
        """Whether the run has its result."""
        return self.file(run).is_file()

    def loss(self, run: Run) -> float:
        """Final validation loss of a finished run; infinite where it diverged."""
        value = self.load(run)["val_loss"]
        return math.inf if value is None else float(value)

    def complete(self, runs: Iterable[Run]) -> None:
        """Train what has no result yet, in `jobs` processes of one thread each. Raises RuntimeError if one fails."""
        missing = [run for run in dict.fromkeys(runs) if not self.done(run)]
        if not missing:
            return
        if self.jobs == 1:
            work(self, missing, os.getppid())
            return
        spawn = multiprocessing.get_context("spawn")
        shares = [missing[i :: self.jobs] for i in range(min(self.jobs, len(missing)))]
        workers = [spawn.Process(target=work, args=(self, share, os.getpid()), daemon=True) for share in shares]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise RuntimeError("a worker process failed; its traceback is above, finished runs are kept")


# ---------------------------------------------------------------------- one process that trains


def work(bench: Bench, runs: Sequence[Run], parent: int) -> None:
    """Train runs one after the other in this process; stop when the process that wanted them is gone."""
    torch.set_num_threads(1)
    start_distributed()
    tokenizer, tokens = load_tokens(bench)
    for run in runs:
        if multiprocessing.parent_process() is not None and os.getppid() != parent:
            return
        result = train(bench, run, tokenizer, tokens)
        unfinished = bench.file(run).with_suffix(".tmp")
        unfinished.write_text(json.dumps(result, indent=1), "utf-8")
        unfinished.replace(bench.file(run))
        loss = "diverged" if result["val_loss"] is None else f"{result['val_loss']:.4f}"
        alphas = " ".join(f"{group} {alpha:.3g}" for group, alpha in result["alphas"].items())
        print(f"{run.name:28s} {loss}  {result['seconds']:.0f} s  {alphas}", flush=True)


def start_distributed() -> None:
    """A process group of this process alone, with a store inside it: no port that two workers could both pick."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    import logging

    import deepspeed
    import torch.distributed
    from deepspeed.utils import logger

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        deepspeed.init_distributed("gloo")
    logger.setLevel(logging.ERROR)


def load_tokens(bench: Bench) -> tuple[Tokenizer, TokenData]:
    """Tokenizer and token files, built once in OUT."""
    settings = bench.settings
    spec = DataSpec.parse(settings.source, eval_share=settings.held_out_share)
    return prepare(
        spec,
        bench.out / "data",
        tokenizer=None,
        vocab_size=settings.vocabulary,
        seed=SPLIT_SEED,
        held_out_tokens=settings.held_out_tokens,
    )


def build_model(settings: Settings, seed: int) -> torch.nn.Module:
    """The untied LLaMA, its weights drawn under `seed`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(  # type: ignore[no-any-return]
        LlamaConfig(
            vocab_size=settings.vocabulary,
            hidden_size=settings.hidden,
            intermediate_size=settings.intermediate,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=settings.length,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def engine_config(bench: Bench, run: Run) -> dict[str, Any]:
    """The DeepSpeed config of a run: the paper's Adam, clip 1.0, and the arm's "mols" section."""
    settings = bench.settings
    section = dict(ARMS[run.arm])
    if section.get("enabled", True):
        section = settings.calibration | section | {"report_dir": str(bench.out / "reports" / run.name)}
    adam = {"lr": run.rate, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True}
    return {
        "train_micro_batch_size_per_gpu": settings.sequences,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": adam},
        "mols": section,
    }


def rate_factor(step: int, settings: Settings) -> float:
    """Schedule: linear warm-up, then a cosine down to 10 % of the base rate. `step` counts from 0."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    x = min(1.0, (step - settings.warmup) / max(1, settings.steps - settings.warmup))
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * x))


def train(bench: Bench, run: Run, tokenizer: Tokenizer, tokens: TokenData) -> dict[str, Any]:
    """Train one arm to the end and evaluate it on the held-out documents. `val_loss` is None where it diverged."""
    import mols_ds

    settings = bench.settings
    assert tokens.train is not None and tokenizer.size <= settings.vocabulary
    model = build_model(settings, run.seed)
    engine, *_ = mols_ds.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=engine_config(bench, run),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate_factor(step, settings)
        ),
    )
    shape = BatchShape(settings.length, settings.sequences, 1, rank=0, world=1)
    batches = PackedBatches(tokens.train, shape, run.seed)
    begin = time.perf_counter()
    losses: list[float] = []
    engine.train()
    ahead = 0  # batches that a calibration looked at since the last update; training starts over at the first of them
    while engine.global_steps < settings.steps:
        step = engine.global_steps
        (batch,) = batches.step("train", step + ahead)
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        if engine.global_steps == step:
            ahead += 1
            continue
        ahead = 0
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    value = evaluate(engine, tokens, settings) if math.isfinite(losses[-1]) else math.nan
    result = {
        **asdict(run),
        "val_loss": value if math.isfinite(value) else None,
        "train_loss": losses[::10],
        "seconds": time.perf_counter() - begin,
        "weights": sum(p.numel() for p in model.parameters()),
        "alphas": dict(engine.mols.alphas),
        "report": engine.mols.report(),
    }
    engine.destroy()
    del engine, model
    gc.collect()
    return result


def evaluate(engine: Any, tokens: TokenData, settings: Settings) -> float:
    """Mean loss in nats a token over `held_out_tokens`, spread evenly over the held-out documents."""
    import numpy as np

    total = len(tokens.held_out) // settings.length
    count = min(total, settings.held_out_tokens // settings.length)
    chosen = np.linspace(0, total - 1, count).astype(np.int64)
    engine.eval()
    losses = 0.0
    with torch.no_grad():
        for first in range(0, count, settings.sequences):
            indices = chosen[first : first + settings.sequences]
            batch = sequences(tokens.held_out, indices, settings.length)
            losses += len(indices) * engine(input_ids=batch, labels=batch).loss.item()
    return losses / count


# ---------------------------------------------------------------------- the experiment


def search(bench: Bench, arms: Sequence[str], rates: Sequence[float], seed: int, extend: int) -> dict[str, list[float]]:
    """Run the grid with one seed; while an arm's best rate is at an edge, go on by factors of 2, `extend` times."""
    grid = {arm: sorted(rates) for arm in arms}
    bench.complete(Run(arm, rate, seed) for arm in arms for rate in grid[arm])
    for _ in range(extend):
        added: list[Run] = []
        for arm, tried in grid.items():
            best = best_rate(bench, arm, tried, seed)
            if len(tried) > 1 and best in (tried[0], tried[-1]):
                rate = best * 2 if best == tried[-1] else best / 2
                grid[arm] = sorted([*tried, rate])
                added.append(Run(arm, rate, seed))
        bench.complete(added)
    return grid


def best_rate(bench: Bench, arm: str, rates: Iterable[float], seed: int) -> float:
    """The rate with the lowest final validation loss."""
    return min(rates, key=lambda rate: bench.loss(Run(arm, rate, seed)))


def publish(bench: Bench, grid: dict[str, list[float]], seeds: Sequence[int]) -> str:
    """Write OUT/convergence.json and OUT/convergence.md from the runs that have finished; returns the markdown."""
    tuned_on = seeds[0]
    results: dict[str, dict[float, dict[int, dict[str, Any]]]] = {}
    for arm, rates in grid.items():
        finished = [Run(arm, rate, seed) for rate in rates for seed in seeds if bench.done(Run(arm, rate, seed))]
        for run in finished:
            results.setdefault(arm, {}).setdefault(run.rate, {})[run.seed] = bench.load(run)
    rows = summarise(results, BASE, tuned_on)
    text = markdown(rows, seeds, tuned_on)
    settings = asdict(bench.settings) | {"warmup": bench.settings.warmup} | bench.settings.calibration
    content = {"settings": settings, "tuned_on_seed": tuned_on, "seeds": list(seeds), "arms": rows}
    (bench.out / "convergence.json").write_text(json.dumps(content, indent=1), "utf-8")
    (bench.out / "convergence.md").write_text(text, "utf-8")
    return text


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/convergence"), help="folder (runs/convergence)")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each (1)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=None, help="arms beside adam (all)")
    parser.add_argument("--rates", nargs="+", type=float, default=None, help="base rates (1e-3 2e-3 4e-3 8e-3)")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="the first is the grid's (0 1 2 3 4)")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps of a run (200)")
    parser.add_argument("--extend", type=int, default=2, help="how often a grid goes on beyond an edge (2)")
    parser.add_argument("--data", default=None, help="stdlib, or a file or folder of text (stdlib)")
    parser.add_argument("--smoke", action="store_true", help="seconds, not an hour: tiny model, 20 steps, 2 arms")
    options = parser.parse_args()
    if options.jobs < 1 or options.extend < 0 or (options.steps is not None and options.steps < 10):
        parser.error("--jobs must be at least 1, --extend at least 0, --steps at least 10")
    return options


def main() -> None:
    """Run what the command line asks for, publishing after the grid and at the end."""
    options = arguments()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    settings = SMOKE if options.smoke else Settings()
    settings = replace(settings, steps=options.steps or settings.steps, source=options.data or settings.source)
    arms = list(dict.fromkeys([BASE, *(options.arms or (["damping"] if options.smoke else ARMS))]))
    rates = options.rates or ((4e-3, 8e-3) if options.smoke else RATES)
    seeds = options.seeds or (SEEDS[:2] if options.smoke else SEEDS)
    bench = Bench(settings, options.out, options.jobs)
    (bench.out / "runs").mkdir(parents=True, exist_ok=True)
    grid = search(bench, arms, rates, seeds[0], 0 if options.smoke else options.extend)
    publish(bench, grid, seeds)
    best = {arm: best_rate(bench, arm, grid[arm], seeds[0]) for arm in arms}
    bench.complete(Run(arm, best[arm], seed) for seed in seeds for arm in arms)
    print(publish(bench, grid, seeds))
    print(f"tables: {bench.out / 'convergence.md'}, everything: {bench.out / 'convergence.json'}")


if __name__ == "__main__":
    main()
