"""Command line of train_megatron.py: arguments, preparation, one or two arms, output."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_patches.machine import Machine, probe_machine
from megatron_patches.precision import check
from mols_ds.apps.train_megatron.backend import MegatronSetup
from mols_ds.apps.train_megatron.dataset import IndexedBatches, Text, evaluation_batches, prepare_text, refuse_streamed
from mols_ds.core.config import MolsConfig
from mols_ds.core.log import tell
from mols_ds.errors import MolsConfigError, MolsWarning, printable
from mols_ds.training.batches import BatchShape
from mols_ds.training.checkpointer import Retention
from mols_ds.training.cli_utils import USER_MISTAKE as USER_MISTAKE
from mols_ds.training.cli_utils import Parser, add_timeout
from mols_ds.training.compare import run_arms
from mols_ds.training.megatron_build import start_grid, start_ranks
from mols_ds.training.megatron_config import (
    GridSizes,
    ddp_config,
    dtype_of,
    micro_batches,
    optimizer_config,
    transformer_config,
    uses_engine,
)
from mols_ds.training.megatron_settings import Settings, read
from mols_ds.training.ranks import check_run, run_command
from mols_ds.training.resume_settings import flatten
from mols_ds.training.run_folder import add_output_arguments, claim, save_settings, settle
from mols_ds.training.sources import DataSpec
from mols_ds.training.train_job import TrainJob
from mols_ds.training.writers import check_writers

PROGRAM = "train_megatron.py"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments of train_megatron.py. Raises MolsConfigError for an unknown or invalid one."""
    parser = Parser(prog=PROGRAM, description="Pre-train a decoder language model with Megatron-core and MoLS.")
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="config file, such as configs/megatron/tiny.yaml")
    add("--compare", choices=["adam"], help="first train the same without MoLS, then compare")
    add_output_arguments(parser, "run.out, or runs/<config>")
    add(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="changes",
        help="override a value of the config, such as run.steps=100; may be given several times",
    )  # fmt: skip
    add_timeout(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run train_megatron.py. Returns the exit status, see `run_command`."""
    return run_command(PROGRAM, lambda: run(parse_arguments(argv)))


def run(args: argparse.Namespace) -> None:
    """Run with parsed arguments. Checks everything it can before anything slow starts."""
    settings = read(args.config, args.changes)
    args.out = args.out or Path(settings.run.out or Path("runs") / f"megatron_{Path(args.config).stem}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    grid = GridSizes.of(settings, world)
    passes = micro_batches(settings, grid)
    _quiet()
    with _megatron_context(settings):
        machine = probe_machine()
        config = transformer_config(settings, machine)
        check(config, optimizer_config(settings), machine=machine)
        ddp_config(settings)
        spec = DataSpec.parse(
            settings.data.source, text_key=settings.data.text_key, eval_share=settings.data.eval_share
        )
        refuse_streamed(spec)
        if settings.data.tokenizer is not None and not Path(settings.data.tokenizer).is_dir():
            raise MolsConfigError(f"data.tokenizer: {settings.data.tokenizer}: no such folder")
        check_writers(settings.run)
        check_run(args, {"mols": settings.mols})
        rank, _ = start_ranks(args.timeout)
        with claim(args.out, overwrite=args.overwrite, rank=rank):
            _train(args, _with_report(settings, args.out), spec, grid, passes, machine, rank)


def _megatron_context(settings: Settings) -> contextlib.AbstractContextManager[None]:
    """Context in which Megatron runs: unchanged on a GPU, `cpu_megatron` elsewhere."""
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    from megatron_patches.cpu.emulation import cpu_megatron

    # DistributedOptimizer's checkpoints cannot be loaded into torch's AdamW, see cpu_megatron
    return cpu_megatron(fused_adam=settings.optimizer.name == "adam" and settings.parallel.distributed_optimizer)


def _with_report(settings: Settings, out: Path) -> Settings:
    """Return the settings with the mols section's total steps and report folder filled in."""
    if settings.mols is None:
        return settings
    section = {"report_dir": str(out / "mols_report"), **settings.mols}
    if section.get("total_steps") is None:
        section["total_steps"] = settings.run.steps
    return settings.with_mols(section)


def _train(
    args: argparse.Namespace,
    settings: Settings,
    spec: DataSpec,
    grid: GridSizes,
    passes: int,
    machine: Machine,
    rank: int,
) -> None:
    from megatron.core import parallel_state

    start_grid(settings, grid, args.timeout)
    plan = settings.run
    shape = BatchShape(plan.seq_len, settings.batch.micro, passes, parallel_state.get_data_parallel_rank(), grid.data)
    cache = Path(settings.data.cache_dir) if settings.data.cache_dir else args.out.resolve().parent / "cache"
    text = prepare_text(
        spec, cache, tokenizer=Path(settings.data.tokenizer) if settings.data.tokenizer else None,
        vocab_size=settings.model.vocab_size, seed=plan.seed, held_out_tokens=plan.eval_sequences * plan.seq_len,
    )  # fmt: skip
    torch.distributed.barrier()  # from here on ranks run together
    batches = IndexedBatches(text, shape, steps=plan.steps, probes=_probe_batches(settings), seed=plan.seed)
    held_out = evaluation_batches(text, shape, plan.eval_sequences, settings.parallel.pp if settings.parallel.vp else 1)
    engine = uses_engine(settings, machine)
    if rank == 0:
        _print_summary(args, settings, text, shape, grid, engine)
    digests = {"tokenizer": text.tokenizer.digest, **text.digests}
    plain = {**flatten(settings.model_dump(mode="json", by_alias=True)), **flatten(digests, "text.")}
    settled = {"program": PROGRAM, "processes": grid.world, **plain}
    changed = settle(args.out, settled, resume=args.resume, rank=rank)
    setup = MegatronSetup(
        settings=settings, machine=machine, grid=grid, held_out=held_out, vocab_size=text.tokenizer.size, engine=engine,
        epochs=batches.epochs,
    )  # fmt: skip
    job = TrainJob(
        setup=setup, batches=batches, shape=shape, rank=rank, steps=plan.steps, out=args.out, seed=plan.seed,
        eval_every=max(1, plan.steps // 5) if plan.eval_every is None else plan.eval_every,
        save_every=plan.save_every, log_every=plan.log_every, resume=args.resume, preemptible=True,
        changed=changed, begin=partial(save_settings, args.out, settled, rank),
        keep=Retention(plan.keep_last, plan.keep_every),
        about={"model": args.config, "data": spec.source, "tokenizer": text.tokenizer.name},
    )  # fmt: skip
    run_arms(job, compare=bool(args.compare))


def _probe_batches(settings: Settings) -> int:
    """Batches of the probe stream; a longer calibration starts again."""
    section = MolsConfig.parse(settings.mols) if settings.mols is not None else None
    if section is None or not section.enabled or section.mode != "probe" or section.fixed_alphas is not None:
        return 0
    return section.max_samples if section.samples == "auto" else section.samples


def _quiet() -> None:
    """Silence Megatron's messages for the progress bar. MoLS's warnings become one line of rank 0."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(megatron|megatron_patches\.cpu|torch)\b.*")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("always", category=MolsWarning)
    rank = int(os.environ.get("RANK", "0"))
    stock = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, MolsWarning):
            stock(message, category, *where, **more)
        elif rank == 0:
            tell(f"warning: {printable(message)}", sys.stderr)

    warnings.showwarning = show


def _print_summary(
    args: argparse.Namespace, settings: Settings, text: Text, shape: BatchShape, grid: GridSizes, engine: bool
) -> None:
    axes = {"TP": settings.parallel.tp, "PP": settings.parallel.pp, "VP": settings.parallel.vp or 1}
    axes |= {"EP": settings.parallel.ep, "CP": settings.parallel.cp, "DP": grid.data}
    used = " ".join(f"{name}{count}" for name, count in axes.items() if count > 1) or "one rank"
    precision = str(dtype_of(settings)).removeprefix("torch.")
    low = settings.precision.fp8 and f"fp8 {settings.precision.fp8_recipe}"
    layers = "Transformer Engine" if engine else "local layers"
    tell(
        f"{args.config}, data {settings.data.source}, tokenizer {text.tokenizer.name} ({text.tokenizer.size} tokens), "
        f"{settings.run.steps} steps of "
        f"{shape.sequences} x {shape.length} tokens, {grid.world} processes, {used}, {low or precision}, {layers}"
    )
