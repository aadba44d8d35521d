"""Step time of MoLS over the stock engine: engines take turns in one run, so that machine noise strikes all alike.

    python benchmarks/overhead.py                      # LLaMA of 10 M weights, ZeRO-3, two gloo processes
    python benchmarks/overhead.py --model gpt2         # fused projections: interleaved ranges go by delta
    python benchmarks/overhead.py --engine torch --rounds 40      # a plain torch optimizer in one process
    python benchmarks/overhead.py --loop --ranks 1     # train.py over a bare DeepSpeed loop

Arms: `stock` (MoLS off), `fixed` (after a calibration: every group but the reference has a multiplier of its own)
and `online` (in the middle of an online calibration, accumulators on the CPU). A round is one optimizer step of each
arm, in an order that rotates; the ratio of a round is arm / stock, and the medians over the rounds are printed. With
--engine torch and one process its CPU seconds are measured, which other programs disturb less than the time. Targets
on a CPU: fixed at most 1.01 (unfused model), online at most 1.25. benchmarks/accumulator.py measures the accumulator.

With --loop: `bare` (deepspeed.initialize, and a loop of three lines), `train.py` (its loop with MoLS off, with data,
metrics and a printed line each step; target at most 1.03) and `torch` (a plain AdamW, under DDP for several ranks; for
information).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ALPHAS = {"embedding": 3.0, "head": 2.0, "qk": 1.3, "mlp": 1.1}
ARMS, LOOPS = ("stock", "fixed", "online"), ("bare", "train.py", "torch")
LENGTH = 128
Step = Callable[[Any], object]
"""Train one step on token ids of shape (sequences, LENGTH)."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("deepspeed", "torch"), default="deepspeed")
    parser.add_argument("--model", choices=("llama", "gpt2"), default="llama", help="unfused or fused projections")
    parser.add_argument("--stage", type=int, default=3, choices=(0, 1, 2, 3), help="ZeRO stage")
    parser.add_argument("--ranks", type=int, help="gloo processes on this machine (2; torch: 1, DDP with more)")
    parser.add_argument("--rounds", type=int, default=30, help="counted steps of each arm")
    parser.add_argument("--warmup", type=int, default=4, help="steps of each arm before counting")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a rank and step, in sequences of 128")
    parser.add_argument("--loop", action="store_true", help="compare train.py's loop instead of MoLS")
    args = parser.parse_args(argv)
    args.ranks = args.ranks or (2 if args.engine == "deepspeed" else 1)
    return args


def build_model(args: argparse.Namespace) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    if args.model == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=args.vocab, n_embd=args.hidden, n_layer=args.layers, n_head=args.hidden // 32,
            n_positions=LENGTH, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 32, max_position_embeddings=LENGTH,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def ds_config(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": args.tokens // LENGTH,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": args.stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        **more,
    }


class TorchEngine:
    """A plain torch optimizer, with the methods of DeepSpeed's engine that this program calls."""

    def __init__(self, module: Any, section: dict[str, Any], total_steps: int, world: int) -> None:
        import torch

        import mols_ds
        from mols_ds.core.handle import Handle

        self.module = module
        self.run = torch.nn.parallel.DistributedDataParallel(module) if world > 1 else module
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
        off = section.get("enabled") is False
        attach = mols_ds.attach
        self.mols = Handle() if off else attach(self.optimizer, self.run, section, total_steps=total_steps)
        self.clip = torch.nn.utils.clip_grad_norm_

    def __call__(self, **batch: Any) -> Any:
        return self.run(**batch)

    def backward(self, loss: Any) -> None:
        loss.backward()

    def step(self) -> None:
        self.mols.read_gradients()
        self.clip(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def build_engine(args: argparse.Namespace, arm: str) -> Any:
    import deepspeed

    import mols_ds

    model = build_model(args)
    if arm == "bare":
        return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config(args))[0]
    steps = args.warmup + args.rounds
    sections: dict[str, dict[str, Any]] = {
        "stock": {"enabled": False},
        "fixed": {"start": 0, "ramp_end": 1, "fixed_alphas": {k: v for k, v in ALPHAS.items() if k != "head"}},
        "online": {"start": 0, "ramp_end": steps + 2, "samples": steps + 1, "mode": "online"},
    }
    if args.model == "llama":
        sections["fixed"]["fixed_alphas"] = dict(ALPHAS)
    mols = sections[arm] | {"report_dir": os.path.join(os.environ["TMP_REPORT"], arm)}
    if args.engine == "torch":
        return TorchEngine(model, mols, steps + 2, args.ranks)
    config = ds_config(args, mols=mols)
    return mols_ds.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def engine_step(engine: Any) -> Step:
    def step(batch: Any) -> None:
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        engine.step()

    return step


def train_py_step(args: argparse.Namespace, rank: int, world: int) -> Step:
    """Return train.py's step, on its own batches of a token file."""
    import numpy as np

    from mols_ds.training.batches import BatchShape, PackedBatches
    from mols_ds.training.deepspeed_backend import DeepSpeedSetup
    from mols_ds.training.task import NextTokens
    from mols_ds.training.train_job import TrainJob
    from mols_ds.training.trainer import Trainer

    shape = BatchShape(LENGTH, args.tokens // LENGTH, 1, rank, world)
    setup = DeepSpeedSetup(ds_config(args), lambda: build_model(args), [], NextTokens(shape))
    out = Path(os.environ["TMP_REPORT"]) / "train.py"
    out.mkdir(exist_ok=True)
    path = out / f"{rank}.bin"
    np.random.default_rng(0).integers(0, args.vocab, 1 << 20, dtype=np.uint16).tofile(path)
    batches = PackedBatches(np.memmap(path, dtype=np.uint16, mode="r"), shape, seed=0)
    job = TrainJob(setup=setup, batches=batches, shape=shape, rank=rank, steps=10**6, out=out, seed=0)
    trainer = Trainer(job, setup.build(job))

    def step(_: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.step()
            trainer.stop_on_signal()

    return step


def torch_step(args: argparse.Namespace, world: int) -> Step:
    import torch

    model = build_model(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)

    def step(batch: Any) -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def work(args: argparse.Namespace) -> None:
    """One rank: build the arms, take turns, print on rank 0."""
    import logging

    import deepspeed
    import torch
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank = deepspeed.comm.get_rank()
    world = deepspeed.comm.get_world_size()
    arms = LOOPS if args.loop else ARMS
    engines = {arm: build_engine(args, arm) for arm in arms if arm not in ("train.py", "torch")}
    steps = {arm: engine_step(engine) for arm, engine in engines.items()}
    if args.loop:
        steps |= {"train.py": train_py_step(args, rank, world), "torch": torch_step(args, world)}
    elements = sum(getattr(p, "ds_numel", p.numel()) for p in engines[arms[0]].module.parameters())
    generator = torch.Generator().manual_seed(rank)
    clock = time.process_time if args.engine == "torch" and args.ranks == 1 else time.perf_counter
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for step in range(args.warmup + args.rounds):
        batch = torch.randint(0, args.vocab, (args.tokens // LENGTH, LENGTH), generator=generator)
        for turn in range(len(arms)):
            arm = arms[(turn + step) % len(arms)]
            deepspeed.comm.barrier()
            begin = clock()
            steps[arm](batch)
            deepspeed.comm.barrier()
            if step >= args.warmup:
                times[arm].append(clock() - begin)
    if not args.loop:
        assert engines["fixed"].mols.phase == "fixed" and engines["online"].mols.phase == "calibrating"
        assert engines["fixed"].mols.multipliers["mlp"] == ALPHAS["mlp"]
    if rank == 0:
        name = "torch" if args.engine == "torch" else f"ZeRO-{args.stage}"
        print(f"{args.model}, {elements:,} weights, {name}, {args.ranks} ranks, {args.tokens} tokens a rank")
        print(f"{'arm':8}{'median step':>14}{'ratio to ' + arms[0]:>18}   (quartiles)")
        for arm in arms:
            ratios = [a / b for a, b in zip(times[arm], times[arms[0]], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            print(f"{arm:8}{statistics.median(times[arm]):>12.4f} s{middle:>18.4f}   ({low:.4f} to {high:.4f})")
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Start the ranks, or be one. Returns the exit status."""
    args = parse(argv)
    if "RANK" in os.environ:
        work(args)
        return 0
    import tempfile

    with tempfile.TemporaryDirectory(prefix="mols_overhead_") as folder:
        environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **os.environ, "TMP_REPORT": folder}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.ranks)]
        return subprocess.run([*command, __file__, *(argv or sys.argv[1:])], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
