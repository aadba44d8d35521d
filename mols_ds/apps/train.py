"""Command line of train.py: arguments, preparation, one or two arms, output."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mols_ds.core.json_types import JsonObject
from mols_ds.core.log import GuardedWriter, tell
from mols_ds.errors import MolsConfigError
from mols_ds.training.batches import Batches, BatchShape, held_out_batches
from mols_ds.training.checkpointer import Retention
from mols_ds.training.cli_utils import USER_MISTAKE, Parser, add_saving, add_timeout, not_negative, positive, share
from mols_ds.training.compare import run_arms
from mols_ds.training.deepspeed_backend import DeepSpeedSetup
from mols_ds.training.ds_config import check_keys, check_with_deepspeed, model_dtype, read_config, resolve
from mols_ds.training.export_weights import save_base
from mols_ds.training.models import build_model, check_compiler, load_model_config, tokenizer_of, zero_init
from mols_ds.training.ranks import check_run, run_command, silence_output, start_ranks
from mols_ds.training.resume_settings import job_settings
from mols_ds.training.run_folder import BASE, add_output_arguments, claim, save_settings, settle
from mols_ds.training.shipped import shipped_root
from mols_ds.training.sources import DataSpec, check_hub
from mols_ds.training.streams import build_batches
from mols_ds.training.task import NextTokens
from mols_ds.training.tokens import Tokenizer, prepare
from mols_ds.training.train_job import TrainJob

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["USER_MISTAKE", "main", "parse_arguments", "run"]

PROGRAM = "train.py"
DEFAULT_MODEL = "configs/models/llama_tiny.json"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments of train.py. Raises MolsConfigError for an unknown or invalid one."""
    parser = Parser(prog=PROGRAM, description="Pre-train a decoder language model with DeepSpeed and MoLS.")
    add = parser.add_argument
    add("--config", "--deepspeed_config", dest="config", metavar="FILE", help="DeepSpeed config, as JSON")
    add("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    add("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    add("--model", default=None, help=f"model file or transformers checkpoint folder (default {DEFAULT_MODEL})")
    add("--compare", choices=["adam"], help="first train the same without MoLS, then compare")
    add_output_arguments(parser, "runs/<model>")
    run = parser.add_argument_group("run")
    run.add_argument("--steps", type=positive, default=240, help="optimizer steps (default %(default)s)")
    run.add_argument("--seq-len", type=positive, default=128, help="tokens per sequence (default %(default)s)")
    run.add_argument("--lr", type=float, help="base learning rate; overrides the config's")
    run.add_argument("--optimizer", metavar="NAME", help="optimizer; overrides the config's (docs/optimizers.md)")
    run.add_argument("--seed", type=not_negative, default=0, help="seed of weights, split and order of the data")
    run.add_argument("--activation-checkpointing", action="store_true", help="recompute activations in backward")
    run.add_argument("--eval-every", type=not_negative, help="steps between evaluations (default: a fifth of --steps)")
    run.add_argument("--eval-sequences", type=positive, default=256, help="held-out sequences to evaluate")
    add_saving(run)
    run.add_argument(
        "--snr-every", type=positive, metavar="N", help="log each group's SNR from Adam's moments every N steps"
    )
    run.add_argument("--profile", type=positive, default=0, metavar="N", help="trace N steps: OUT/profile/trace.json")
    run.add_argument("--attention", metavar="NAME", help="transformers' attn_implementation, such as sdpa or eager")
    run.add_argument(
        "--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile the model (default: inductor)"
    )
    add_timeout(run)
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="stdlib", help="stdlib, a file, a folder, configs/data/*.json or a hub name")
    data.add_argument("--text-key", help="text column (default: text)")
    data.add_argument("--eval-share", type=share, help="share of held-out documents")
    data.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: the model's, or trained on the data)")
    data.add_argument("--vocab-size", type=positive, help="size of a trained tokenizer (default: the model's)")
    data.add_argument("--cache-dir", type=Path, help="tokenizers and tokens (default: cache beside --out)")
    args = parser.parse_args(argv)
    if args.config is None:
        raise MolsConfigError("no config: `deepspeed --config FILE train.py`, or give --deepspeed_config FILE")
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise MolsConfigError(f"--lr {args.lr} is not above 0 and finite")
    if args.vocab_size is not None and (
        args.tokenizer is not None or (args.model is not None and Path(args.model).is_dir())
    ):
        raise MolsConfigError("--vocab-size is the size of a tokenizer to train: leave it out, this run has one")
    if args.model is None:
        args.model = str(shipped_root() / DEFAULT_MODEL)
    if args.out is None:
        args.out = Path("runs") / Path(args.model).stem
    if args.cache_dir is None:
        args.cache_dir = args.out.resolve().parent / "cache"
    if args.eval_every is None:
        args.eval_every = max(1, args.steps // 5)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run train.py. Returns the exit status, see `run_command`."""
    return run_command(PROGRAM, lambda: run(parse_arguments(argv)))


def run(args: argparse.Namespace) -> None:
    """Run with parsed arguments. Checks everything it can before anything slow starts."""
    silence_output()
    raw = read_config(args.config)
    check_keys(raw, args.config, args.optimizer)
    model_config = load_model_config(args.model)
    spec = DataSpec.parse(args.data, text_key=args.text_key, eval_share=args.eval_share)
    check_hub(spec)
    folder = tokenizer_of(args.model, args.tokenizer)
    check_run(args, raw)
    rank, world = start_ranks(args.timeout)
    with claim(args.out, overwrite=args.overwrite, rank=rank):
        _train(args, raw, model_config, spec, folder, rank, world)


def _train(
    args: argparse.Namespace,
    raw: JsonObject,
    model_config: PretrainedConfig,
    spec: DataSpec,
    folder: Path | None,
    rank: int,
    world: int,
) -> None:
    from deepspeed.accelerator import get_accelerator

    config = resolve(raw, world=world, steps=args.steps, out=args.out, lr=args.lr, optimizer=args.optimizer)
    check_with_deepspeed(config, args.config)
    if args.compile is not None:
        check_compiler(args.compile, get_accelerator().current_device_name(), config)
    shape = BatchShape(
        args.seq_len, config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"], rank, world
    )
    vocab_size = args.vocab_size or int(model_config.vocab_size)
    needed = args.eval_sequences * args.seq_len
    tokenizer, tokens = prepare(
        spec, args.cache_dir, tokenizer=folder, vocab_size=vocab_size, seed=args.seed, held_out_tokens=needed
    )
    batches = build_batches(spec, tokenizer, tokens, shape, args.seed)
    held_out = held_out_batches(tokens.held_out, shape, args.eval_sequences)
    torch.distributed.barrier()  # from here on ranks run together
    if rank == 0:
        _print_summary(args, config, tokenizer, shape)
    streamed = {"sources": [asdict(part) for part in spec.sources]} if spec.streaming else {}
    text = {"tokenizer": tokenizer.digest, **tokens.digests, **streamed}
    settings = job_settings(PROGRAM, args, config, model=model_config.to_diff_dict(), text=text, processes=world)
    changed = settle(args.out, settings, resume=args.resume, rank=rank)
    about = {"model": args.model, "data": spec.source, "tokenizer": tokenizer.name}
    begin = partial(save_settings, args.out, settings, rank)
    _arms(args, config, partial(_model, args, config, tokenizer), batches, held_out, shape, about, changed, begin)


def _model(args: argparse.Namespace, config: JsonObject, tokenizer: Tokenizer) -> torch.nn.Module:
    """Build the model of an arm: equal weights for equal arguments. Sharded from the start under stage 3."""
    sharded = zero_init(config)
    model = build_model(
        args.model,
        vocab_size=tokenizer.size,
        end=tokenizer.end,
        seq_len=args.seq_len,
        seed=args.seed,
        dtype=model_dtype(config),
        checkpointing=args.activation_checkpointing,
        attention=args.attention,
    )
    del sharded  # transformers builds sharded models while this object exists
    if torch.distributed.get_rank() == 0:
        GuardedWriter()(BASE, lambda: save_base(model.config, tokenizer.identity, args.out))
    return model


def _arms(
    args: argparse.Namespace,
    config: JsonObject,
    model: Callable[[], torch.nn.Module],
    batches: Batches,
    held_out: list[tuple[torch.Tensor, int]],
    shape: BatchShape,
    about: JsonObject,
    changed: bool,
    begin: Callable[[], None],
) -> None:
    """Train the one arm, or first Adam's, and print the results."""
    from mols_ds.engines.deepspeed.snr_monitor import SnrWatch  # here: it imports DeepSpeed, which `patch` must precede

    watch = None if args.snr_every is None else SnrWatch(args.snr_every)
    job = TrainJob(
        setup=DeepSpeedSetup(config, model, held_out, NextTokens(shape), watch, args.compile), batches=batches,
        shape=shape, rank=shape.rank, steps=args.steps, out=args.out, seed=args.seed, eval_every=args.eval_every,
        save_every=args.save_every, log_every=args.log_every, resume=args.resume, preemptible=True,
        changed=changed, begin=begin, about=about, profile=args.profile,
        keep=Retention(args.keep_last, args.keep_every),
    )  # fmt: skip
    run_arms(job, compare=bool(args.compare))


def _print_summary(args: argparse.Namespace, config: JsonObject, tokenizer: Tokenizer, shape: BatchShape) -> None:
    precision = str(model_dtype(config)).removeprefix("torch.")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    tell(
        f"{args.model}, data {args.data}, tokenizer {tokenizer.name} ({tokenizer.size} tokens), {args.steps} steps of "
        f"{shape.sequences} x {shape.length} tokens, {shape.world} processes, ZeRO {stage}, {precision}, into "
        f"{args.out}"
    )
