"""One launch of a run on a rank: the engines' own jobs on a tiny model, with the faults' places in them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from tests.helpers.harness import draw_nothing
from tests.tools.faults.faults import CALLS, RAMP, SAMPLES, SAVE_EVERY, START, Fault, Injection

draw_nothing()

Name = Literal["zero1", "zero2", "zero3", "megatron"]
SEED, LENGTH, VOCABULARY = 3, 32, 300
MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
}


@dataclass(frozen=True)
class Engine:
    """What is trained, in which calibration mode and precision.

    `unchecked`: DeepSpeed skips an update whose gradients are not finite (in 0.19 in every precision), unless
    `bf16.check_grad_overflow` is off. Then it is taken, and the weights are not finite any more.
    """

    name: Name
    world: int
    mode: Literal["probe", "online"]
    dtype: Literal["fp32", "bf16"] = "fp32"
    stage: int = 0
    unchecked: bool = False

    @property
    def steps(self) -> int:
        """Updates; the loop's calls are the same in both modes, as a probe is a call and no update."""
        return CALLS if self.mode == "online" else CALLS - SAMPLES

    @property
    def section(self) -> dict[str, Any]:
        ramp_end = START + RAMP + (SAMPLES if self.mode == "online" else 0)
        return {
            "mode": self.mode,
            "start": START,
            "samples": SAMPLES,
            "ramp_end": ramp_end,
            "noise_floor_correction": False,
            "estimator": "mean",
        }


ENGINES: dict[Name, Engine] = {
    "zero1": Engine("zero1", 2, "online", "bf16", stage=1, unchecked=True),
    "zero2": Engine("zero2", 2, "probe", "bf16", stage=2),
    "zero3": Engine("zero3", 2, "online", stage=3),
    "megatron": Engine("megatron", 4, "probe"),
}


@dataclass(frozen=True)
class Order:
    """One launch. `out`: the run's folder; `data`: where the launches share text and tokens; `timeout`: of a
    collective, in seconds."""

    engine: Name
    out: str
    data: str
    timeout: int
    fault: Fault | None = None


def launch(order: Order) -> dict[str, Any]:
    """Run on every rank: start the run, or continue it where it has a checkpoint, as a launcher that restarts does.
    Returns hashes of what this rank ends with; nothing for a run that a signal ended."""
    from mols_ds.training.preemption import Preempted

    fault = order.fault
    mine = fault is not None and int(os.environ["RANK"]) in fault.ranks
    injection = Injection(fault) if fault is not None and mine else None
    engine = ENGINES[order.engine]
    ended: dict[str, Any] = {}
    stopped = contextlib.suppress(Preempted)
    with places(injection, Path(order.out), ended, megatron=engine.name == "megatron"), stopped:
        (_megatron if engine.name == "megatron" else _deepspeed)(engine, order)
    return ended


def _deepspeed(engine: Engine, order: Order) -> None:
    """`mols_ds.training.trainer.train` as train.py calls it, with tokens drawn here instead of a text."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mols_ds.training.batches import BatchShape, PackedBatches, held_out_batches
    from mols_ds.training.deepspeed_backend import DeepSpeedSetup
    from mols_ds.training.ds_config import resolve
    from mols_ds.training.models import zero_init
    from mols_ds.training.ranks import start_ranks
    from mols_ds.training.task import NextTokens
    from mols_ds.training.train_job import TrainJob
    from mols_ds.training.trainer import has_checkpoint, train

    rank, world = start_ranks(order.timeout)
    out = Path(order.out)
    raw: dict[str, Any] = {
        "train_batch_size": 4,
        "bf16": {"enabled": engine.dtype == "bf16", "check_grad_overflow": not engine.unchecked},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": engine.stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "mols": engine.section,
    }
    if engine.stage == 3:
        raw["zero_optimization"] |= {"sub_group_size": 4000, "stage3_param_persistence_threshold": 20}
    config = resolve(raw, world=world, steps=engine.steps, out=out)
    shape = BatchShape(LENGTH, config["train_micro_batch_size_per_gpu"], 1, rank, world)
    tokens = (np.random.default_rng(SEED).random(20_000) ** 2 * VOCABULARY).astype(np.uint16)

    def model() -> torch.nn.Module:
        torch.manual_seed(SEED)
        sharded = zero_init(config)
        built: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**MODEL))
        del sharded
        return built

    setup = DeepSpeedSetup(config, model, held_out_batches(tokens[16_000:], shape, 4), NextTokens(shape))
    job = TrainJob(
        setup=setup, batches=PackedBatches(tokens[:16_000], shape, SEED), shape=shape, rank=rank, steps=engine.steps,
        out=out, seed=SEED, eval_every=6, save_every=SAVE_EVERY, resume=has_checkpoint(out), preemptible=True,
    )  # fmt: skip
    train(job)


def _megatron(engine: Engine, order: Order) -> None:
    """train_megatron.py's own `run`, tensor-parallel 2 x pipeline 2, behind its command line."""
    import queue

    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from mols_ds.apps.train_megatron.main import parse_arguments, run
    from mols_ds.training.trainer import has_checkpoint

    filesystem_async._results_queue = queue.Queue()  # else a server process is spawned for it, a second each
    argv = ["--config", order.data + "/job.yaml", "--out", order.out, "--timeout", str(order.timeout)]
    argv.append("--resume" if has_checkpoint(Path(order.out)) else "--overwrite")
    run(parse_arguments(argv))


def write_megatron_job(engine: Engine, folder: Path) -> None:
    """The config and the text of `_megatron`."""
    from tests.apps.command import write_text

    small = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 2}
    source = {"source": str(write_text(folder / "text.jsonl")), "eval_share": 0.2, "cache_dir": str(folder / "cache")}
    content = {
        "data": source,
        "model": {**small, "vocab_size": VOCABULARY, "vocab_multiple": 4, "hidden_dropout": 0.1},
        "parallel": {"tp": 2, "pp": 2, "sp": True},
        "precision": {"dtype": engine.dtype},
        "optimizer": {"lr": 1e-2},
        "batch": {"micro": 1, "global": 2},
        "run": {
            "steps": engine.steps,
            "seq_len": LENGTH,
            "seed": SEED,
            "eval_sequences": 4,
            "eval_every": 6,
            "save_every": SAVE_EVERY,
        },
        "mols": engine.section,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(content), "utf-8")


# ------------------------------------------------------------------ places of the faults


@contextlib.contextmanager
def places(injection: Injection | None, out: Path, ended: dict[str, Any], *, megatron: bool) -> Iterator[None]:
    """The loop of the engine with `injection` at its places; `ended` gets the fingerprint of a run that ended."""
    from mols_ds.training.trainer import Trainer

    loop: Any = Trainer
    stock = {name: getattr(loop, name) for name in ("run", "step", "save")}

    def run(self: Any) -> Any:
        outcome = stock["run"](self)
        ended.update(_megatron_end(self) if megatron else _deepspeed_end(self))
        return outcome

    loop.run = run
    if injection is not None:
        _hook_loop(loop, injection, out, stock, megatron=megatron)
        _hook_calls(injection)
    try:
        yield
    finally:
        for name, method in stock.items():
            setattr(loop, name, method)


def _hook_loop(loop: Any, injection: Injection, out: Path, stock: dict[str, Any], *, megatron: bool) -> None:
    def step(self: Any) -> Any:
        backend = self.backend
        owner = backend.built.optimizer if megatron else backend.engine
        if "injected" not in vars(owner):
            owner.injected = True
            owner.step = _before(injection.before_update, owner.step)
        modules = backend.built.chunks if megatron else [backend.engine.module]
        injection.before_step(p for module in modules for p in module.parameters())
        return stock["step"](self)

    def save(self: Any) -> None:
        injection.save(functools.partial(stock["save"], self), out)

    loop.step, loop.save = step, save


def _before(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(then)
    def both(*args: Any, **kwargs: Any) -> Any:
        first()
        return then(*args, **kwargs)

    return both


def _hook_calls(injection: Injection) -> None:
    """What the loop calls on the way; never taken back, as this process ends after the launch."""
    import torch

    from mols_ds.core.controller import Controller

    finish: Any = Controller._finish
    Controller._finish = _before(injection.before_report, finish)  # type: ignore[method-assign]
    torch.save = _before(injection.before_write, torch.save)
    for name in ("rename", "replace"):
        stock = getattr(os, name)

        def renamed(source: Any, target: Any, stock: Any = stock, **more: Any) -> None:
            injection.before_rename(os.fspath(source), os.fspath(target))
            stock(source, target, **more)

        setattr(os, name, renamed)


# ------------------------------------------------------------------ what a run ends with


def _deepspeed_end(loop: Any) -> dict[str, Any]:
    from tests.engines.deepspeed.resume import fingerprint

    return fingerprint(loop.backend.engine)


def _megatron_end(loop: Any) -> dict[str, Any]:
    from tests.engines.megatron.state import fingerprint

    built = loop.backend.built
    return fingerprint(built, built.optimizer, built.scheduler, loop.backend.mols)
