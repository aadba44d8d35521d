"""Command line of finetune.py: arguments, preparation, one or two arms, evaluation, output."""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mols_ds.apps.finetune import evaluate
from mols_ds.apps.finetune.data import AnswerBatches, Tokenized, held_out_batches, load_tokenizer, prepare
from mols_ds.apps.finetune.model import ADAPTER, MODEL, AdapterSettings, build, load_config
from mols_ds.apps.finetune.task import Answers
from mols_ds.core.config import MolsConfig, SummedRate
from mols_ds.core.json_types import JsonObject
from mols_ds.core.log import tell
from mols_ds.core.phases import summed_rate_step
from mols_ds.errors import MolsConfigError, MolsWarning
from mols_ds.training.batches import BatchShape
from mols_ds.training.checkpointer import Retention
from mols_ds.training.cli_utils import (
    USER_MISTAKE,
    Parser,
    above_zero,
    add_saving,
    add_timeout,
    not_negative,
    positive,
    share,
)
from mols_ds.training.compare import run_arms
from mols_ds.training.deepspeed_backend import WARMUP_SHARE, DeepSpeedSetup
from mols_ds.training.ds_config import (
    BATCH_KEYS,
    check_keys,
    check_with_deepspeed,
    model_dtype,
    native_bf16,
    read_config,
    resolve,
)
from mols_ds.training.models import zero_init
from mols_ds.training.ranks import check_run, run_command, silence_output, start_ranks
from mols_ds.training.resume_settings import job_settings
from mols_ds.training.run_folder import add_output_arguments, claim, save_settings, settle
from mols_ds.training.sources import DataSpec, check_hub
from mols_ds.training.train_job import TrainJob

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = ["USER_MISTAKE", "main", "parse_arguments", "run"]

PROGRAM = "finetune.py"
EPOCHS, BATCH, CUTOFF, RANK = 3, 16, 2048, 8
"""Settings of the paper's fine-tuning (table 11: 3 epochs, batch 16, cut-off 2048, rank 8 at 3B and 7B)."""
RATES = {"full": 2e-5, "lora": 2e-4, "dora": 2e-4}
"""Base rates if neither the config nor --lr gives one; for adapters those of the paper's 1B model."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments of finetune.py. Raises MolsConfigError for an unknown or invalid one."""
    parser = Parser(prog=PROGRAM, description="Fine-tune a language model with DeepSpeed and MoLS.")
    add = parser.add_argument
    add("--config", "--deepspeed_config", dest="config", metavar="FILE", help="DeepSpeed config, as JSON")
    add("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    add("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    add("--model", required=True, help="transformers checkpoint folder or hub name")
    add("--compare", choices=["adam"], help="first train the same without MoLS, then compare")
    add_output_arguments(parser, "runs/<model>-<method>")
    _run_arguments(parser)
    _adapter_arguments(parser)
    _data_arguments(parser)
    group = parser.add_argument_group("evaluation by lm-eval")
    group.add_argument("--evaluate", metavar="TASKS", help="commonsense8, mmlu, or lm-eval's tasks, with commas")
    group.add_argument("--evaluate-tasks", type=Path, metavar="FOLDER", help="more tasks, as YAML files")
    group.add_argument("--evaluate-limit", type=positive, metavar="N", help="only the first N questions of each task")
    group.add_argument("--evaluate-batch", type=positive, default=8, help="questions at a time (default %(default)s)")
    args = parser.parse_args(argv)
    _check_arguments(args)
    return args


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--method", choices=sorted(RATES), default="lora", help="parameters to train (default %(default)s)")
    add("--epochs", type=not_negative, default=EPOCHS, help="passes over the data (default %(default)s; 0: evaluate)")
    add("--steps", type=positive, help="optimizer steps; overrides --epochs")
    add("--lr", type=float, help="base learning rate; overrides the config's")
    add("--optimizer", metavar="NAME", help="optimizer; overrides the config's (docs/optimizers.md)")
    add("--seed", type=not_negative, default=0, help="seed of adapters, split and order of the data")
    add("--activation-checkpointing", action="store_true", help="recompute activations in backward")
    add("--eval-every", type=not_negative, help="steps between held-out losses (default: a fifth of all steps)")
    add("--eval-examples", type=positive, default=256, help="held-out examples to evaluate")
    add_saving(run)
    add_timeout(run)


def _adapter_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("adapters").add_argument
    add("--lora-rank", type=positive, help=f"rank (default {RANK})")
    add("--lora-alpha", type=above_zero, help="scale of the adapters: alpha / rank (default: twice the rank)")
    add("--lora-dropout", type=share, help="dropout before the adapters (default 0)")
    add("--lora-targets", help="names of layers, with commas (default: all linear layers but the output head)")


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--data", help="JSONL, JSON or parquet file, a folder of them, configs/data/*.json or a hub name")
    add("--eval-data", help="held-out examples (default: a share of --data)")
    add("--eval-share", type=share, default=0.05, help="share of --data held out (default %(default)s)")
    add("--cutoff", type=positive, help=f"most tokens per example (default {CUTOFF}, or the model's positions)")
    add("--template", choices=["auto", "plain", "chat"], default="auto", help="how examples become text")
    add("--tokenizer", help="tokenizer folder or hub name (default: the model's)")


def _check_arguments(args: argparse.Namespace) -> None:
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise MolsConfigError(f"--lr {args.lr} is not above 0 and finite")
    if args.out is None:
        args.out = Path("runs") / f"{Path(args.model).name}-{args.method}"
    for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"):
        if args.method == "full" and getattr(args, name) is not None:
            raise MolsConfigError(f"--{name.replace('_', '-')} is for adapters: use --method lora or dora")
    if args.method != "full" and importlib.util.find_spec("peft") is None:
        raise MolsConfigError(f"--method {args.method} needs peft, which is not installed: pip install 'peft>=0.14'")
    for name in ("evaluate_tasks", "evaluate_limit"):
        if getattr(args, name) is not None and args.evaluate is None:
            raise MolsConfigError(f"--{name.replace('_', '-')} needs --evaluate")
    if args.epochs == 0 and args.steps is None:
        if args.evaluate is None:
            raise MolsConfigError("--epochs 0 trains nothing: give --evaluate, or epochs")
        if args.compare or args.resume:
            raise MolsConfigError("--epochs 0 trains nothing: leave out --compare and --resume")
        return
    if args.config is None:
        raise MolsConfigError(f"no config: `deepspeed --config FILE {PROGRAM}`, or give --deepspeed_config FILE")
    if args.data is None:
        raise MolsConfigError("--data is missing: a JSONL file, or a hub name")


def main(argv: Sequence[str] | None = None) -> int:
    """Run finetune.py. Returns the exit status, see `run_command`."""
    return run_command(PROGRAM, lambda: run(parse_arguments(argv)))


def run(args: argparse.Namespace) -> None:
    """Run with parsed arguments. Checks everything it can before anything slow starts."""
    silence_output()
    if args.epochs == 0 and args.steps is None:
        _evaluate_only(args)
        return
    raw = read_config(args.config)
    check_keys(raw, args.config, args.optimizer)
    spec = DataSpec.parse(args.data, eval_share=args.eval_share)
    held_out_spec = None if args.eval_data is None else DataSpec.parse(args.eval_data)
    for source in filter(None, (spec, held_out_spec)):
        check_hub(source)
    model_config = load_config(args.model)
    cutoff = _cutoff(args, model_config)
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    check_run(args, raw)
    asked = _asked(args)
    data, held_out = prepare(
        spec, held_out_spec, tokenizer=tokenizer, template=args.template, cutoff=cutoff, seed=args.seed
    )
    rank, world = start_ranks(args.timeout)
    with claim(args.out, overwrite=args.overwrite, rank=rank):
        folders, dtype = _train(args, raw, model_config, tokenizer, data, held_out, cutoff, rank, world)
        if rank == 0:
            _after(args, folders, asked, tokenizer, dtype)


def _train(
    args: argparse.Namespace,
    raw: JsonObject,
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: Tokenized,
    held_out: Tokenized,
    cutoff: int,
    rank: int,
    world: int,
) -> tuple[list[Path], torch.dtype]:
    """Train one or two arms. Returns their folders and the dtype of the model."""
    config = _config(args, raw, world, len(data))
    steps = config.pop("steps")
    shape = BatchShape(
        cutoff, config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"], rank, world
    )
    warn_small(config, len(data), steps, adapters=args.method != "full")
    pad = int(tokenizer.pad_token_id)
    batches = AnswerBatches(data, shape, args.seed, pad)
    torch.distributed.barrier()  # from here on ranks run together
    if rank == 0:
        _print_summary(args, config, data, held_out, steps, world)
    adapters = _adapters(args)
    lora = {} if adapters is None else {f"lora_{key}": value for key, value in asdict(adapters).items()}
    resolved = argparse.Namespace(**{**vars(args), **lora, "steps": steps, "cutoff": cutoff, "epochs": None})
    text = {"examples": data.digest, "held_out": held_out.digest}
    settings = job_settings(PROGRAM, resolved, config, model=model_config.to_diff_dict(), text=text, processes=world)
    changed = settle(args.out, settings, resume=args.resume, rank=rank)
    about = {"model": args.model, "data": args.data, "tokenizer": args.tokenizer or args.model}
    setup = DeepSpeedSetup(
        config=config, model=partial(_model, args, config, len(tokenizer), rank),
        held_out=held_out_batches(held_out, shape, args.eval_examples, pad),
        task=Answers(batches, tokenizer, args.method != "full", _identity(args, data)),
    )  # fmt: skip
    job = TrainJob(
        setup=setup, batches=batches, shape=shape, rank=rank, steps=steps, out=args.out, seed=args.seed,
        eval_every=max(1, steps // 5) if args.eval_every is None else args.eval_every,
        save_every=args.save_every, log_every=args.log_every, resume=args.resume, preemptible=True,
        changed=changed, begin=partial(save_settings, args.out, settings, rank), about=about,
        keep=Retention(args.keep_last, args.keep_every),
    )  # fmt: skip
    return run_arms(job, compare=bool(args.compare)), model_dtype(config)


def _cutoff(args: argparse.Namespace, config: PretrainedConfig) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or CUTOFF
    if args.cutoff is not None and args.cutoff > positions:
        raise MolsConfigError(f"--cutoff {args.cutoff}: model {args.model} has max_position_embeddings {positions}")
    return args.cutoff or min(CUTOFF, positions)


def _config(args: argparse.Namespace, raw: JsonObject, world: int, examples: int) -> JsonObject:
    """Return the resolved DeepSpeed config, with the number of "steps" added."""
    raw = copy.deepcopy(raw)
    if all(raw.get(key, "auto") == "auto" for key in BATCH_KEYS[:2]):
        raw[BATCH_KEYS[0]] = BATCH
    given = raw.get("optimizer", {}).get("params", {}).get("lr", "auto")
    lr = args.lr or (RATES[args.method] if given == "auto" else None)
    batch = resolve(raw, world=world, steps=1, out=args.out, optimizer=args.optimizer)[BATCH_KEYS[0]]
    steps = args.steps or math.ceil(args.epochs * examples / batch)
    config = resolve(raw, world=world, steps=steps, out=args.out, lr=lr, optimizer=args.optimizer)
    check_with_deepspeed(config, args.config)
    return {**config, "steps": steps}


def warn_small(config: JsonObject, examples: int, steps: int, *, adapters: bool) -> None:
    """Warn where MoLS measures less than it seems to.

    Args:
        config: resolved.
        examples: number of training examples.
        steps: optimizer steps of the run.
        adapters: train adapters.

    Raises:
        MolsConfigError: no rate would ever change.
    """
    section = MolsConfig.parse(config.get("mols", {"enabled": False}))
    if not section.enabled or section.fixed_alphas is not None:
        return
    samples = section.max_samples if section.samples == "auto" else section.samples
    if isinstance(section.start, SummedRate):
        start, _ = summed_rate_step(section.start.summed_rate, None, round(WARMUP_SHARE * steps))
    else:
        start = (
            section.start if isinstance(section.start, int) else round(section.start * (section.total_steps or steps))
        )
    if section.mode != "probe" and section.samples != "auto" and start + samples >= steps:
        raise MolsConfigError(
            f'"mols": measuring takes {samples} steps from step {start} on, but there are only {steps}, and no rate '
            'would ever change: use "mode": "probe", fewer "samples" or more --epochs'
        )
    batch = config["train_batch_size"]
    if samples * batch > examples:
        up_to = "up to " if section.samples == "auto" else ""
        warnings.warn(
            f"MoLS measures {up_to}{samples} batches of {batch}, more than the {examples} examples: it uses some of "
            'them twice and underestimates the noise (use fewer "mols.samples" or a smaller batch)',
            MolsWarning,
            stacklevel=2,
        )
    if adapters and start == 0:
        warnings.warn(
            "MoLS measures at step 0, where adapters' lora_A has no gradient yet (lora_B is 0): it measures each group "
            'by its other adapter weights ("mols.start": 1 or later measures all)',
            MolsWarning,
            stacklevel=2,
        )


def _identity(args: argparse.Namespace, data: Tokenized) -> dict[str, object]:
    identity: dict[str, object] = {"method": args.method, "data": data.digest}
    return identity if args.method == "full" else {**identity, "lora-rank": args.lora_rank or RANK}


def _adapters(args: argparse.Namespace) -> AdapterSettings | None:
    if args.method == "full":
        return None
    rank = args.lora_rank or RANK
    return AdapterSettings(
        rank=rank,
        alpha=args.lora_alpha if args.lora_alpha is not None else 2.0 * rank,
        dropout=args.lora_dropout or 0.0,
        targets=tuple(args.lora_targets.split(",")) if args.lora_targets else "all-linear",
        dora=args.method == "dora",
    )


def _model(args: argparse.Namespace, config: JsonObject, vocab_size: int, rank: int) -> torch.nn.Module:
    """Build the model of an arm: equal weights for equal arguments. Sharded from the start under stage 3."""
    sharded = zero_init(config)
    model = build(
        args.model, vocab_size=vocab_size, seed=args.seed, dtype=model_dtype(config), adapters=_adapters(args),
        checkpointing=args.activation_checkpointing,
    )  # fmt: skip
    del sharded  # transformers builds sharded models while this object exists
    if rank == 0:
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
        trained = sum(size for size, wanted in sizes if wanted)
        tell(f"{args.method}: {trained:,} of {sum(size for size, _ in sizes):,} weights are trained")
    return model


def _print_summary(
    args: argparse.Namespace, config: JsonObject, data: Tokenized, held_out: Tokenized, steps: int, world: int
) -> None:
    stage = config.get("zero_optimization", {}).get("stage", 0)
    precision = str(model_dtype(config)).removeprefix("torch.")
    tell(
        f"{args.model}, data {args.data}, tokenizer {args.tokenizer or args.model}, {len(data):,} examples, "
        f"{len(held_out):,} held out, {steps} steps of "
        f"{config['train_batch_size']} examples, rate {config['optimizer']['params']['lr']:g}, {world} processes, "
        f"ZeRO {stage}, {precision}, into {args.out}"
    )
    cut, dropped = data.cut + held_out.cut, data.dropped + held_out.dropped
    if cut or dropped:
        tell(
            f"{cut:,} examples were longer than the cut-off and were truncated; {dropped:,} had no answer within it "
            "and were left out"
        )


def _asked(args: argparse.Namespace) -> evaluate.Evaluation | None:
    if args.evaluate is None:
        return None
    return evaluate.parse(
        args.evaluate, folder=args.evaluate_tasks, limit=args.evaluate_limit, batch=args.evaluate_batch
    )


def _after(
    args: argparse.Namespace,
    folders: list[Path],
    asked: evaluate.Evaluation | None,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> None:
    """On rank 0, print where the weights are and evaluate each arm. A task that fails is a line on stderr."""
    name = MODEL if args.method == "full" else ADAPTER
    for folder in folders:
        tell(f"{name}: {folder / name}")
        if asked is not None:
            gc.collect()
            results = evaluate.evaluate(asked, str(folder / name), folder, tokenizer=tokenizer, dtype=dtype)
            _print_results(asked, results, folder)
            for task, reason in results.failures.items():
                tell(f"warning: --evaluate {task}: {reason}; the training is done", sys.stderr)


def _print_results(asked: evaluate.Evaluation, results: evaluate.Results, folder: Path) -> None:
    for task, metrics in results.metrics.items():
        tell(f"{task}: {json.dumps({key: round(value, 4) for key, value in metrics.items()})}")
    for name, value in evaluate.averages(asked.sets, results).items():
        tell(f"{name}: mean accuracy {value:.4f}")
    tell(f"evaluation: {folder / evaluate.FILE}")


def _evaluate_only(args: argparse.Namespace) -> None:
    """Evaluate the model or adapter without training (--epochs 0), in the first process. A failed task is an error."""
    import os

    asked = _asked(args)
    if asked is None or int(os.environ.get("RANK", "0")) != 0:
        return
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    dtype = torch.bfloat16 if native_bf16() else torch.float32
    results = evaluate.evaluate(asked, args.model, args.out, tokenizer=tokenizer, dtype=dtype)
    _print_results(asked, results, args.out)
    if results.failures:
        task, reason = next(iter(results.failures.items()))
        more = f" (and {len(results.failures) - 1} more tasks)" if len(results.failures) > 1 else ""
        raise MolsConfigError(f"--evaluate {task}{more}: {reason}")
