"""The training loop of the main job: one engine, from its first step to its last, with everything it writes."""

import gc
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mols_ds.core.files import write_whole
from mols_ds.errors import MolsCheckpointError, MolsConfigError
from mols_ds.training.batches import Batches, BatchShape, Stream
from mols_ds.training.checkpointer import Keeper, refuse_non_finite, step_of
from mols_ds.training.checkpointer import has_checkpoint as kept
from mols_ds.training.preemption import Preempted, StopRequest
from mols_ds.training.progress import Progress
from mols_ds.training.rng_state import load_random, save_random
from mols_ds.training.task import NextTokens, Task

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
CLIENT_KEY = "main_job"
WARMUP_SHARE, FINAL_SHARE = 0.10, 0.10
"""METHOD, the paper's schedule: linear warm-up over 10 % of the steps, then cosine to 10 % of the base rate."""


def schedule(steps: int) -> Callable[[int], float]:
    """Share of the base rate at each step, counted from 0: (t + 1) / w up to warm-up's w steps, then cosine."""
    warmup = max(1, round(WARMUP_SHARE * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step + 1 - warmup) / max(1, steps - warmup))
        return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def has_checkpoint(out: Path) -> bool:
    """Whether an arm that writes to `out` has saved one."""
    return kept(out / CHECKPOINTS)


@dataclass(frozen=True)
class Job:
    """What one arm trains and how, the same on every rank. `config` is a resolved DeepSpeed config.

    With `probe_ahead`, mode "probe" measures the batches that training comes to next, which are then trained on, and
    not batches of a stream of its own: no arm of a comparison sees a text that another does not. With `stop_diverged`,
    a run whose loss is not finite ends there, with a held-out loss of NaN. With `preemptible`, SIGTERM and SIGUSR1 end
    the run with a checkpoint. `watch` is called with the engine after every update. `keep_last` is whether the end is
    saved too, `shown` whether rank 0 shows progress. `task` is what a micro-batch is and what its loss is; None:
    `NextTokens`.
    """

    config: dict[str, Any]
    model: Callable[[], nn.Module]
    batches: Batches
    held_out: list[tuple[Any, int]]
    shape: BatchShape
    steps: int
    out: Path
    seed: int
    eval_every: int = 0
    save_every: int = 0
    log_every: int = 1
    resume: bool = False
    probe_ahead: bool = False
    keep_last: bool = True
    stop_diverged: bool = False
    preemptible: bool = False
    watch: Callable[[Any], None] | None = None
    shown: bool = True
    task: Task | None = None


@dataclass
class Outcome:
    """What an arm came to: the last line of its metrics file, and where the report is, if one was written."""

    val_loss: float
    tokens: int
    alphas: dict[str, float] = field(default_factory=dict)
    report: Path | None = None
    probe_steps: int = 0
    seconds: float = 0.0

    @property
    def val_ppl(self) -> float:
        """exp of the held-out loss."""
        return math.exp(min(self.val_loss, 700.0))


def train(job: Job) -> Outcome:
    """Trains one arm to its last step and returns its outcome, the same on every rank.

    Raises MolsConfigError and MolsCheckpointError for what the user got wrong, MolsTrainingError where the weights are
    not finite when they are to be saved, and Preempted after the checkpoint of a run that was asked to end.
    """
    import mols_ds

    started = time.monotonic()
    model = job.model()
    rates: dict[str, Any] = {}
    if "scheduler" not in job.config:
        rates["lr_scheduler"] = lambda optimizer: LambdaLR(optimizer, schedule(job.steps))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = mols_ds.initialize(model=model, model_parameters=trainable, config=job.config, **rates)
    torch.manual_seed(job.seed + 1 + job.shape.rank)  # dropout differs between ranks
    loop = _Loop(job, engine)
    try:
        if job.resume:
            loop.load()
        with loop.stop if job.preemptible else nullcontext():
            outcome = loop.run()
    finally:
        loop.close()
        engine.destroy()
        del engine, model, loop
        gc.collect()
    outcome.seconds = time.monotonic() - started
    return outcome


class _Loop:
    """Drives the engine by its own count of steps: `global_steps` stands still while MoLS probes, so the loop trains
    exactly `steps` updates whatever the mode."""

    def __init__(self, job: Job, engine: Any) -> None:
        self.job, self.engine = job, engine
        self.task = job.task or NextTokens(job.shape)
        self.first = job.shape.rank == 0
        self.probe_steps = 0
        self.ahead = 0
        """Batches that were measured since the last update."""
        self.diverged = False
        self.saved = -1
        """Step of the newest checkpoint that this run knows of."""
        self.stop = StopRequest()
        options = job.config.get("checkpoint") or {}
        self.universal = bool(options.get("load_universal"))
        if engine.checkpoint_engine.is_decoupled():
            raise MolsConfigError(
                '"checkpoint.writer.decoupled" writes on after the save has returned, and this loop renames what is '
                "written: leave it out"
            )
        self.keeper = Keeper(self.folder, node_local=bool(options.get("use_node_local_storage")))
        self.metrics = Metrics(job.out / METRICS) if self.first else None
        self.bar = Progress(job.out.name, job.steps, shown=self.first and job.shown)

    def close(self) -> None:
        self.bar.close()

    # -- checkpoints

    @property
    def folder(self) -> Path:
        return self.job.out / CHECKPOINTS

    def save(self) -> None:
        job, engine, task = self.job, self.engine, self.task
        now = engine.global_steps
        refuse_non_finite(engine.module.parameters(), now, self.agree)
        counted = {"probe_steps": self.probe_steps, "ahead": self.ahead, "steps": job.steps, "seed": job.seed}
        state = {CLIENT_KEY: {**counted, **task.identity}}

        def write(place: Path) -> None:
            engine.save_checkpoint(
                str(place.parent), tag=place.name, client_state=state, save_latest=False,
                exclude_frozen_parameters=task.partial,
            )  # fmt: skip
            save_random(place, job.shape.rank, job.shape.world)
            task.save(engine, job.out if now >= job.steps else place)

        self.keeper.save(f"step{now}", write)
        self.saved = now

    def load(self) -> None:
        """Continues from the newest whole checkpoint. Raises MolsCheckpointError where none is, or it is another run's.

        A universal checkpoint is the one that DeepSpeed's `latest_universal` names.
        """
        tag = None if self.universal else self.keeper.newest()
        try:
            strict = not self.task.partial
            path, client = self.engine.load_checkpoint(str(self.folder), tag=tag, load_module_strict=strict)
        except (OSError, EOFError, KeyError, RuntimeError, ValueError, AssertionError) as error:
            if isinstance(error, MolsCheckpointError):
                raise
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise MolsCheckpointError(f"--resume: the checkpoint in {self.folder} cannot be loaded: {line}") from error
        state = (client or {}).get(CLIENT_KEY)
        if path is None or state is None:
            raise MolsCheckpointError(f"--resume: {self.folder} holds no checkpoint of this program")
        for key, now in {"steps": self.job.steps, "seed": self.job.seed, **self.task.identity}.items():
            if state.get(key) != now:
                made = f"--resume: the checkpoint was made with --{key} {state.get(key)}, not {now}"
                raise MolsCheckpointError(made)
        self.probe_steps, self.ahead = int(state["probe_steps"]), int(state.get("ahead", 0))
        self.saved = step_of(tag or "")
        load_random(Path(path).parent, self.job.shape.rank, self.job.shape.world)
        if self.metrics is not None:
            self.metrics.rewind(self.engine.global_steps)

    # -- training

    def run(self) -> Outcome:
        job, engine = self.job, self.engine
        if self.metrics is not None and not job.resume:
            self.metrics.clear()
        val_loss = None
        while engine.global_steps < job.steps and not self.diverged:
            val_loss = self.step()
            if job.preemptible and engine.global_steps < job.steps:
                self.heed()
        if self.diverged:
            val_loss = math.nan
        if val_loss is None:  # resumed at the end
            val_loss = self.evaluate()
        if job.keep_last and self.saved != engine.global_steps:
            self.save()
        mols = getattr(engine, "mols", None)
        outcome = Outcome(val_loss, self.task.tokens(engine.global_steps), dict(getattr(mols, "alphas", {})))
        outcome.probe_steps = self.probe_steps
        if outcome.alphas:
            report = Path(job.config["mols"]["report_dir"]) / "mols_report.json"
            outcome.report = report if report.is_file() else None
        if self.metrics is not None:
            last = {"val_loss": val_loss, "val_ppl": outcome.val_ppl}
            self.metrics.write({"final": True, **last, "tokens": outcome.tokens, "alphas": outcome.alphas})
        return outcome

    def heed(self) -> None:
        """Saves and raises Preempted where any rank was asked to end."""
        name = self.stop.agreed(self.largest)
        if name is None:
            return
        self.save()
        raise Preempted(f"stopped by {name} after step {self.engine.global_steps}; --resume goes on from there")

    def step(self) -> float | None:
        """One step of the engine, logged where it was an update. Returns the held-out loss if it was evaluated."""
        job, engine = self.job, self.engine
        began = time.monotonic()
        before = engine.global_steps
        mols = getattr(engine, "mols", None)
        measures = probing(mols, job.config)
        stream: Stream = "probe" if measures and not job.probe_ahead else "train"
        position = self.probe_steps if stream == "probe" else before + (self.ahead if measures else 0)
        rate = engine.get_lr()[0]
        loss = torch.zeros((), dtype=torch.float64)
        for batch in job.batches.step(stream, position):
            out = self.task.loss(engine, batch)
            engine.backward(out)
            loss += out.detach().to("cpu", torch.float64)
            engine.step()
        if engine.global_steps == before:
            self.probe_steps += 1
            self.ahead += job.probe_ahead
            self.bar.probing(self.probe_steps)
            return None
        self.ahead = 0
        seconds = time.monotonic() - began
        now = engine.global_steps
        if job.watch is not None:
            job.watch(engine)
        last = now >= job.steps
        evaluated = self.evaluate() if last or (job.eval_every and now % job.eval_every == 0) else None
        if now % job.log_every == 0 or evaluated is not None:
            mean = self.average(loss / job.shape.accumulation)
            self.diverged = job.stop_diverged and not math.isfinite(mean)
            self.log(now, mean, evaluated, rate, seconds)
        if job.save_every and now % job.save_every == 0:
            self.save()
        return evaluated

    def log(self, step: int, loss: float, val_loss: float | None, rate: float, seconds: float) -> None:
        """`rate` is the base rate that this step was taken with, before any module's multiplier."""
        mols = getattr(self.engine, "mols", None)
        phase = getattr(mols, "phase", "disabled")
        line: dict[str, Any] = {"step": step, "tokens": self.task.tokens(step), "loss": loss}
        if val_loss is not None:
            line["val_loss"] = val_loss
        line |= {"lr": rate, "multipliers": dict(getattr(mols, "multipliers", {})), "phase": phase}
        line["step_seconds"] = round(seconds, 6)
        if self.metrics is not None:
            self.metrics.write(line)
        monitor = getattr(self.engine, "monitor", None)
        if self.first and monitor is not None and monitor.enabled:
            values = {"loss": loss, **({} if val_loss is None else {"val_loss": val_loss})}
            values |= {f"multiplier_{group}": value for group, value in line["multipliers"].items()}
            samples = self.engine.global_samples
            monitor.write_events([(f"Train/Samples/{name}", value, samples) for name, value in values.items()])
        self.bar.update(step, loss, val_loss, phase)

    def average(self, value: torch.Tensor) -> float:
        """The mean over ranks of a float64 scalar."""
        return float(self.total(value.reshape(1))[0]) / self.job.shape.world

    def largest(self, value: float) -> float:
        """The maximum over ranks."""
        if self.job.shape.world == 1:
            return value
        moved = torch.tensor([value], dtype=torch.float32, device=self.engine.device)
        torch.distributed.all_reduce(moved, op=torch.distributed.ReduceOp.MAX)
        return float(moved)

    def agree(self, fine: bool) -> bool:
        """Whether all ranks say yes."""
        return not self.largest(float(not fine))

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a float64 vector, on the CPU."""
        if self.job.shape.world == 1:
            return values
        moved = values.to(self.engine.device)
        torch.distributed.all_reduce(moved)
        return moved.cpu()

    def evaluate(self) -> float:
        """Mean loss a token over all held-out sequences of all ranks."""
        engine = self.engine
        sums = torch.zeros(2, dtype=torch.float64)
        engine.eval()
        with torch.no_grad():
            for batch, valid in self.job.held_out:
                sums += torch.tensor(self.task.held_out(engine, batch, valid), dtype=torch.float64)
        engine.train()
        loss, count = self.total(sums).tolist()
        return float(loss / count)


def probing(mols: Any, config: dict[str, Any]) -> bool:
    """Whether the next step of the engine measures without updating, so that it gets a batch of the probe stream."""
    from mols_ds.core.config import MolsConfig

    if getattr(mols, "phase", "disabled") != "calibrating":
        return False
    return MolsConfig.parse(config["mols"]).mode == "probe"


class Metrics:
    """OUT/metrics.jsonl: one JSON object a line, written through at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        self.path.write_text("", "utf-8")

    def write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> None:
        """Drops what an interrupted run wrote after the checkpoint at `step`."""
        lines = self.path.read_text("utf-8").splitlines() if self.path.is_file() else []
        kept = []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # half a line: the process was killed while it wrote
            if entry.get("step", step + 1) <= step:
                kept.append(line + "\n")
        write_whole(self.path, "".join(kept))
