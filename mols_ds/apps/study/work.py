"""Execute one run of a study, from its settings to its result. Every rank calls `execute` with the same run."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from mols_ds.apps.study.runs import SCHEMA, Store, StudyRun, arm_config
from mols_ds.apps.study.spec import Study
from mols_ds.core.files import append, write_whole
from mols_ds.core.groups import group_table
from mols_ds.core.json_text import read_json
from mols_ds.core.json_types import JsonObject
from mols_ds.core.log import GuardedWriter
from mols_ds.engines.deepspeed.snr_monitor import Reading, SnrWatch
from mols_ds.errors import MolsError
from mols_ds.training.batches import BatchShape, held_out_batches
from mols_ds.training.deepspeed_backend import DeepSpeedSetup
from mols_ds.training.ds_config import check_with_deepspeed, model_dtype, resolve
from mols_ds.training.models import build_model, load_model_config, zero_init
from mols_ds.training.sources import DataSpec, check_hub
from mols_ds.training.streams import build_batches
from mols_ds.training.task import NextTokens
from mols_ds.training.tokens import TokenData, Tokenizer, prepare
from mols_ds.training.train_job import Outcome, TrainJob
from mols_ds.training.trainer import METRICS, has_checkpoint, read_lines, train

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

READINGS = "snr.jsonl"
CURVE_POINTS = 200
"""Largest number of training loss points in a result; each is the mean of the steps since the one before."""


class Worker:
    """Executes runs of one study. Keeps tokenizers and token files open between runs.

    rank: of this process in a job of `world` ranks that executes one run at a time.
    """

    def __init__(self, study: Study, store: Store, rank: int = 0, world: int = 1) -> None:
        self.study, self.store, self.rank, self.world = study, store, rank, world
        self.tokens = lru_cache(maxsize=None)(self._prepare)

    def model_source(self, model: str) -> str:
        """Return the path of a model file or checkpoint folder for `mols_ds.training.models`."""
        settings = self.study.models[model]
        if isinstance(settings, str):
            return settings
        path = self.store.out / "models" / f"{model}.json"
        text = json.dumps(settings, indent=2) + "\n"
        if not path.is_file() or path.read_text("utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
        return str(path)

    def _prepare(self, model: str) -> tuple[DataSpec, Tokenizer, TokenData]:
        study, data = self.study.at(model), self.study.data
        spec = DataSpec.parse(data.source, text_key=data.text_key, eval_share=data.eval_share)
        check_hub(spec)
        tokenizer, tokens = prepare(
            spec,
            self.store.out / "cache",
            tokenizer=None if data.tokenizer is None else Path(data.tokenizer),
            vocab_size=int(load_model_config(self.model_source(model)).vocab_size),
            seed=data.split_seed,
            held_out_tokens=study.evaluation.sequences * study.batch.length,
        )
        return spec, tokenizer, tokens

    def config(self, run: StudyRun, out: Path) -> JsonObject:
        """Return the resolved DeepSpeed config of a run. Raises MolsConfigError if DeepSpeed refuses it."""
        study = self.study.at(run.model)
        config = arm_config(study, run.arm, run.values)
        if "mols" in config:
            config["mols"].setdefault("report_dir", str(out / "mols_report"))
        config = resolve(config, world=self.world, steps=study.steps, out=out)
        check_with_deepspeed(config, f"of arm {run.arm}")
        return config

    def job(self, run: StudyRun, out: Path, watch: Callable[[DeepSpeedEngine], None] | None = None) -> TrainJob:
        """Return the job of a run for `mols_ds.training.trainer.train`. `watch` is called after every update."""
        study = self.study.at(run.model)
        spec, tokenizer, tokens = self.tokens(run.model)
        config = self.config(run, out)
        shape = BatchShape(
            study.batch.length,
            config["train_micro_batch_size_per_gpu"],
            config["gradient_accumulation_steps"],
            self.rank,
            self.world,
        )
        batches = build_batches(spec, tokenizer, tokens, shape, run.seed)
        setup = DeepSpeedSetup(
            config=config,
            model=partial(self.model, run, config, tokenizer),
            held_out=held_out_batches(tokens.held_out, shape, study.evaluation.sequences),
            task=NextTokens(shape),
            watch=watch,
        )
        return TrainJob(
            setup=setup,
            batches=batches,
            shape=shape,
            rank=self.rank,
            steps=study.steps,
            out=out,
            seed=run.seed,
            eval_every=study.eval_every,
            save_every=study.save_every,
            resume=has_checkpoint(out),
            probe_ahead=not spec.streaming,  # a stream cannot be rewound: it is measured on separate batches
            save_at_end=False,
            stop_diverged=True,
            shown=False,
        )

    def model(self, run: StudyRun, config: JsonObject, tokenizer: Tokenizer) -> torch.nn.Module:
        """Build the model of a run. Equal seeds give equal weights in all arms."""
        sharded = zero_init(config)
        model = build_model(
            self.model_source(run.model),
            vocab_size=tokenizer.size,
            end=tokenizer.end,
            seq_len=self.study.at(run.model).batch.length,
            seed=run.seed,
            dtype=model_dtype(config),
            checkpointing=self.study.activation_checkpointing,
        )
        del sharded
        return model

    def execute(self, run: StudyRun) -> JsonObject:
        """Train a run to its end and save its result on rank 0. Return the result.

        An interrupted run continues from its newest checkpoint if the study saves any (`save_every`), else it starts
        over. Raises MolsError on all ranks if the result cannot be saved.
        """
        out = self.store.folder(run)
        first = self.rank == 0
        if first and not has_checkpoint(out):
            shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        watch, elements = None, dict[str, int]()
        study = self.study.at(run.model)
        snr = study.snr
        if snr is not None and run.arm in snr.arms and run.seed in study.seeds:
            watch = KeptWatch(snr.every, out / READINGS, first)

        def after_update(engine: DeepSpeedEngine) -> None:
            if not elements:
                elements.update(group_table(engine.module).elements)
            if watch is not None:
                watch(engine)

        job = self.job(run, out, after_update)
        began = time.process_time()
        outcome = train(job)
        result: JsonObject = {"schema": SCHEMA, "model": run.model, "arm": run.arm, "values": dict(run.values)}
        result |= {"seed": run.seed, "steps": study.steps, "tokens": outcome.tokens}
        result |= {"tokens_per_step": study.tokens_per_step, "probe_passes": outcome.probe_steps}
        result |= {"weights": sum(elements.values()), "groups": elements, "alphas": outcome.alphas}
        result["val_loss"] = outcome.val_loss if math.isfinite(outcome.val_loss) else None
        result["snr"] = {} if watch is None else {"step": watch.steps, "groups": watch.as_snr(), **watch.curves}
        result["seconds"], result["cpu_seconds"] = outcome.seconds, time.process_time() - began
        problem = [self._keep(run, outcome, result) if first else None]
        torch.distributed.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise MolsError(problem[0])
        return result

    def _keep(self, run: StudyRun, outcome: Outcome, result: JsonObject) -> str | None:
        """Save a run's result with its report and curves. Return an error message for all ranks, or None."""
        out = self.store.folder(run)
        try:
            result["report"] = read_json(outcome.report, str(outcome.report)) if outcome.report else {}
            result |= curves(out / METRICS, self.study.at(run.model).tokens_per_step)
            self.store.save(run, result)
        except (MolsError, OSError) as error:
            return f"the result of {run.label} cannot be saved: {error}"
        shutil.rmtree(out, ignore_errors=True)
        return None


class KeptWatch(SnrWatch):
    """A `SnrWatch` that writes its readings beside the checkpoints, so that an interrupted run keeps its curve."""

    def __init__(self, every: int, path: Path, writes: bool) -> None:
        super().__init__(every)
        self.path, self.writes = path, writes
        self._begun = False
        self.guarded = GuardedWriter()

    def __call__(self, engine: DeepSpeedEngine) -> None:
        if not self._begun:
            self._begun = True
            readings = read_lines(self.path) if self.path.is_file() else []
            self.restore(cast("list[Reading]", readings), int(engine.global_steps))
        known = len(self.steps)
        super().__call__(engine)
        if self.writes and len(self.steps) > known:
            line = json.dumps(self.reading()) + "\n"
            self.guarded(self.path.name, lambda: append(self.path, line))


def curves(path: Path, tokens_per_step: int) -> JsonObject:
    """Read training and validation loss over steps and tokens, and the median step time, from a metrics file. "losses":
    hash of the training loss of every step."""
    steps = [line for line in read_lines(path) if "step" in line]
    stride = max(1, math.ceil(len(steps) / CURVE_POINTS))
    blocks = [steps[i : i + stride] for i in range(0, len(steps), stride)]
    validated = [line for line in steps if "val_loss" in line]
    every = json.dumps([line["loss"] for line in steps])
    means = [(block[-1]["step"], statistics.fmean(line["loss"] for line in block)) for block in blocks]
    return {
        "losses": hashlib.blake2b(every.encode(), digest_size=6).hexdigest(),
        "curve": _curve(means, tokens_per_step),
        "val_curve": _curve([(line["step"], line["val_loss"]) for line in validated], tokens_per_step),
        "step_seconds": statistics.median(line["step_seconds"] for line in steps),
    }


def _curve(points: list[tuple[int, float]], tokens_per_step: int) -> dict[str, list[int] | list[float | None]]:
    losses = [loss if math.isfinite(loss) else None for _, loss in points]
    steps = [step for step, _ in points]
    return {"step": steps, "tokens": [step * tokens_per_step for step in steps], "loss": losses}
