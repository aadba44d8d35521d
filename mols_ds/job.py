"""The main job's command line: arguments, preparation, one or two arms, and what is printed at the end."""

import argparse
import copy
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

from mols_ds.batches import Batches, BatchShape, PackedBatches, StreamedBatches, held_out_batches
from mols_ds.compare import ADAM, print_comparison, print_outcome, split_arms
from mols_ds.data import DataSpec, check_hub
from mols_ds.errors import MolsConfigError, MolsError, MolsWarning
from mols_ds.models import build_model, load_model_config, zero_init
from mols_ds.settings import check_with_deepspeed, model_dtype, read_config, resolve
from mols_ds.tokens import Tokenizer, prepare
from mols_ds.training import Job, has_checkpoint, train

USER_MISTAKE = 2
PATIENCE_SECONDS = 15.0
"""How long other ranks wait for rank 0 to say what is wrong (the launcher then ends them) before they say it."""
DEFAULT_MODEL = "configs/models/llama_tiny.json"


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are user's mistakes like all others: one line, from one rank."""

    def error(self, message: str) -> NoReturn:
        raise MolsConfigError(f"{message} (see --help)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of train.py. Raises MolsConfigError for an unknown or a bad one."""
    parser = _Parser(prog="train.py", description="Pre-train a decoder language model with DeepSpeed and MoLS.")
    add = parser.add_argument
    add("--config", "--deepspeed_config", dest="config", metavar="FILE", help="DeepSpeed config, as JSON")
    add("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    add("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    add("--model", default=None, help=f"model file or transformers checkpoint folder (default {DEFAULT_MODEL})")
    add("--out", type=Path, default=None, help="folder for everything that is written (default runs/<model>)")
    add("--compare", choices=["adam"], help="first train the same without MoLS, then compare")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    run = parser.add_argument_group("run")
    run.add_argument("--steps", type=_positive, default=240, help="optimizer steps (default %(default)s)")
    run.add_argument("--seq-len", type=_positive, default=128, help="tokens a sequence (default %(default)s)")
    run.add_argument("--lr", type=float, help="base rate, in the place of the config's")
    run.add_argument("--seed", type=_not_negative, default=0, help="weights, split and order of the data")
    run.add_argument("--activation-checkpointing", action="store_true", help="recompute activations in backward")
    run.add_argument("--eval-every", type=_not_negative, help="steps between evaluations (default: a fifth of --steps)")
    run.add_argument("--eval-sequences", type=_positive, default=256, help="held-out sequences that are evaluated")
    run.add_argument("--save-every", type=_not_negative, default=0, help="steps between checkpoints (0: the end only)")
    run.add_argument("--log-every", type=_positive, default=1, help="steps between lines of metrics.jsonl")
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="stdlib", help="stdlib, a file, a folder, configs/data/*.json or a hub name")
    data.add_argument("--text-key", help="column of the text (default: text)")
    data.add_argument("--eval-share", type=float, help="share of documents held out")
    data.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: trained on the data)")
    data.add_argument("--vocab-size", type=_positive, help="size of a trained tokenizer (default: the model's)")
    data.add_argument("--cache-dir", type=Path, help="tokenizers and tokens (default: cache beside --out)")
    args = parser.parse_args(argv)
    if args.config is None:
        raise MolsConfigError("no config: `deepspeed --config FILE train.py`, or give --deepspeed_config FILE")
    if args.lr is not None and not args.lr > 0:
        raise MolsConfigError(f"--lr {args.lr} is not above 0")
    if args.model is None:
        args.model = str(Path(__file__).resolve().parent.parent / DEFAULT_MODEL)
    if args.out is None:
        args.out = Path("runs") / Path(args.model).stem
    if args.cache_dir is None:
        args.cache_dir = args.out.resolve().parent / "cache"
    if args.eval_every is None:
        args.eval_every = max(1, args.steps // 5)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs train.py. Returns 0, or 2 for a user's mistake, which rank 0 states in one line on stderr."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        run(parse_arguments(argv))
    except MolsError as error:
        if rank != 0:
            # Rank 0 meets the same mistake and says it; its exit makes the launcher end this process. What only this
            # rank can see (a file missing on its node) must still be said.
            time.sleep(PATIENCE_SECONDS)
        where = f" (rank {rank})" if rank != 0 else ""
        line = " ".join(str(error).split())
        print(f"train.py{where}: {line}", file=sys.stderr, flush=True)
        return USER_MISTAKE
    return 0


def run(args: argparse.Namespace) -> None:
    """Everything after the arguments. Checks what can be checked before anything slow is started."""
    _quiet()
    raw = read_config(args.config)
    if args.compare and not raw.get("mols", {}).get("enabled", "mols" in raw):
        raise MolsConfigError(f'--compare adam: config {args.config} has no enabled "mols" section to compare with')
    model_config = load_model_config(args.model)
    spec = DataSpec.parse(args.data, text_key=args.text_key, eval_share=args.eval_share)
    check_hub(spec)
    if args.tokenizer is not None and not args.tokenizer.is_dir():
        raise MolsConfigError(f"--tokenizer {args.tokenizer}: no such folder")
    if args.resume and not has_checkpoint(args.out / ADAM if args.compare else args.out):
        raise MolsConfigError(f"--resume: there is no checkpoint below {args.out}; leave it out to start a new run")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MolsConfigError(f"--out {args.out}: {error.strerror or error}") from error
    rank, world = _start_ranks()
    config = resolve(raw, world=world, steps=args.steps, out=args.out, lr=args.lr)
    check_with_deepspeed(config, args.config)
    shape = BatchShape(
        args.seq_len, config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"], rank, world
    )
    vocab_size = args.vocab_size or int(model_config.vocab_size)
    needed = args.eval_sequences * args.seq_len
    tokenizer, tokens = prepare(
        spec, args.cache_dir, tokenizer=args.tokenizer, vocab_size=vocab_size, seed=args.seed, held_out_tokens=needed
    )
    batches: Batches
    if tokens.train is None:
        batches = StreamedBatches(spec, tokenizer, shape, args.seed)
    else:
        batches = PackedBatches(tokens.train, shape, args.seed)
    held_out = held_out_batches(tokens.held_out, shape, args.eval_sequences)
    torch.distributed.barrier()  # from here on ranks run in step
    if rank == 0:
        _say_what(args, config, tokenizer, shape)
    _arms(args, config, partial(_model, args, config, tokenizer), batches, held_out, shape)


def _model(args: argparse.Namespace, config: dict[str, Any], tokenizer: Tokenizer) -> torch.nn.Module:
    """The model of an arm: equal weights for equal arguments. Sharded from the start under stage 3."""
    sharded = zero_init(config)
    model = build_model(
        args.model,
        vocab_size=tokenizer.size,
        end=tokenizer.end,
        seq_len=args.seq_len,
        seed=args.seed,
        dtype=model_dtype(config),
        checkpointing=args.activation_checkpointing,
    )
    del sharded  # transformers builds sharded models for as long as this lives
    return model


def _arms(
    args: argparse.Namespace, config: dict[str, Any], model: Any, batches: Batches, held_out: Any, shape: BatchShape
) -> None:
    """Trains the one arm, or Adam's first, and prints what came out."""
    job = Job(
        config=config, model=model, batches=batches, held_out=held_out, shape=shape, steps=args.steps, out=args.out,
        seed=args.seed, eval_every=args.eval_every, save_every=args.save_every, log_every=args.log_every,
        resume=args.resume,
    )  # fmt: skip
    if not args.compare:
        outcome = train(job)
        if shape.rank == 0:
            print_outcome(outcome, args.out)
        return
    outcomes = {}
    for name, arm_config in split_arms(config, args.out).items():
        # An interrupted comparison may not have come to its second arm yet
        resume = args.resume and has_checkpoint(args.out / name)
        arm = replace(job, out=args.out / name, config=copy.deepcopy(arm_config), resume=resume)
        arm.out.mkdir(exist_ok=True)
        outcomes[name] = train(arm)
    if shape.rank == 0:
        print_comparison(outcomes, args.out)


def _quiet() -> None:
    """Leaves the terminal to the progress bar; DeepSpeed's warnings stay."""
    import logging
    import warnings

    from deepspeed.utils import logger
    from transformers.utils import logging as transformers_logging

    logger.setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*")
    stock = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, MolsWarning):
            stock(message, category, filename, lineno, file, line)
        elif int(os.environ.get("RANK", "0")) == 0:
            print(f"warning: {message}", file=sys.stderr, flush=True)

    warnings.showwarning = show


def _start_ranks() -> tuple[int, int]:
    """Joins the ranks that the launcher started; a plain `python train.py` is one rank. Returns (rank, world)."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    if "RANK" not in os.environ:
        os.environ.update({key: os.environ.get(key, value) for key, value in defaults.items()})
    if get_accelerator().device_name() == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce for a minute before the first step; gloo does as well here
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            local = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    else:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _say_what(args: argparse.Namespace, config: dict[str, Any], tokenizer: Tokenizer, shape: BatchShape) -> None:
    precision = str(model_dtype(config)).removeprefix("torch.")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    print(
        f"{Path(args.model).stem}, {tokenizer.size} tokens of vocabulary, {args.steps} steps of {shape.sequences} x "
        f"{shape.length} tokens, {shape.world} processes, ZeRO {stage}, {precision}, into {args.out}",
        flush=True,
    )
