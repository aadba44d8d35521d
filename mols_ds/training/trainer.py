"""Training loop of train.py, finetune.py, train_megatron.py and studies: one arm from its first to its last update.

The loop counts, evaluates, logs, saves, resumes and stops. The engine trains (`train_job.TrainBackend`).
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from mols_ds.core.config import MolsConfig
from mols_ds.core.files import append, read_text, write_whole
from mols_ds.core.json_text import parse_json
from mols_ds.core.json_types import JsonObject
from mols_ds.core.log import GuardedWriter, tell
from mols_ds.errors import MolsCheckpointError, MolsConfigError
from mols_ds.training.batches import Stream
from mols_ds.training.checkpointer import Checkpointer, check_finite, step_of
from mols_ds.training.checkpointer import has_checkpoint as saved_in
from mols_ds.training.preemption import Preempted, StopRequest
from mols_ds.training.profiling import Trace
from mols_ds.training.progress import Progress
from mols_ds.training.speed import Waiting, peak_memory
from mols_ds.training.streams import load_places, save_places
from mols_ds.training.train_job import Outcome, TrainBackend, TrainJob

METRICS = "metrics.jsonl"
GROUP_EVENTS = {"applied_lr": "applied_lrs", "snr": "snr", "snr_moments": "snr_moments"}
TIMED = ("step_seconds", "tokens_per_second", "memory_bytes", "mfu")
"""Keys of metrics that differ between two equal runs."""
EVENTS = ("loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes", "mfu", "step_seconds")
CHECKPOINTS = "checkpoints"
ADAM, MOLS = "adam", "mols"
"""Folders in OUT of the two arms of a comparison."""


def has_checkpoint(out: Path) -> bool:
    """Whether an arm has saved a checkpoint in `out`."""
    return saved_in(out / CHECKPOINTS)


def train(job: TrainJob) -> Outcome:
    """Train one arm to its last update.

    Returns:
        Its outcome, the same on every rank.

    Raises:
        MolsConfigError, MolsUnsupportedError, MolsCheckpointError: a user's mistake.
        MolsTrainingError: weights are not finite at a save.
        MolsError: Megatron skipped too many iterations in a row.
        Preempted: a signal ended the run; its checkpoint is saved.
    """
    started = time.monotonic()
    backend = job.setup.build(job)
    trainer = Trainer(job, backend)
    try:
        if job.resume:
            trainer.load()
        job.begin()
        with trainer.stop if job.preemptible else nullcontext():
            outcome = trainer.run()
    finally:
        trainer.close()
        backend.close()
        del backend, trainer
        gc.collect()
    outcome.seconds = time.monotonic() - started
    return outcome


class Trainer:
    """The loop of one arm.

    It counts updates itself. A batch that MoLS only measures is not an update, so the run has exactly `job.steps`
    updates in every mode.

    Attributes:
        updates: updates so far.
        probe_steps: batches measured without an update, so far.
        ahead: those since the last update that training uses too (`TrainJob.probe_ahead`).
        diverged: the loss is not finite, and the job stops then.
        guarded: runs this rank's writes beside training.
        saved: update of the newest known checkpoint; -1: none.
    """

    def __init__(self, job: TrainJob, backend: TrainBackend) -> None:
        self.job, self.backend = job, backend
        self.updates = self.probe_steps = self.ahead = 0
        self.diverged = False
        self.saved = -1
        self.guarded = GuardedWriter()
        self.stop = StopRequest()
        self.folder = job.out / CHECKPOINTS
        self.checkpointer = Checkpointer(self.folder, node_local=backend.node_local, keep=job.keep)
        first = job.rank == 0
        self.metrics = Metrics(job.out / METRICS, job.about) if first else None
        self.bar = Progress(job.out.name, job.steps, shown=first and job.shown)
        self.probes = probe_samples(job.setup.section)
        self.unlogged, self.waited = Interval(), Waiting()
        self.trace = Trace(job.out / "profile", job.profile) if first and job.profile else None
        self.peak = peak_rate(backend)
        self.alphas_seen: dict[str, float] = {}

    def close(self) -> None:
        """Restore the terminal."""
        self.guarded("progress", self.bar.close)
        if self.trace is not None:
            self.guarded("profile", self.trace.close)

    # -- checkpoints

    @property
    def identity(self) -> JsonObject:
        """Settings by name that a resumed run must share with its checkpoint."""
        return {"steps": self.job.steps, "seed": self.job.seed, **self.backend.identity}

    def save(self) -> None:
        """Save a checkpoint of this update. Raises MolsTrainingError if weights are not finite."""
        check_finite(self.backend.parameters(), self.updates, self.backend.agree)
        counted = {"probe_steps": self.probe_steps, "ahead": self.ahead, **self.identity}
        write = self.backend.checkpoint_writer(self.updates, counted)

        def write_all(place: Path) -> None:
            write(place)
            save_places(self.job.batches, place)

        self.checkpointer.save(f"step{self.updates}", write_all)
        self.saved = self.updates

    def load(self) -> None:
        """Continue from the newest complete checkpoint.

        Raises:
            MolsCheckpointError: there is none, or it belongs to another run.
        """
        backend = self.backend
        tag = None if backend.universal else self.checkpointer.newest()
        counted = backend.load_checkpoint(self.folder, tag)
        if counted is None:
            raise MolsCheckpointError(f"--resume: {self.folder} contains no checkpoint of this program")
        steps = int(counted["steps"])
        for key, now in self.identity.items():
            longer = key == "steps" and self.job.steps > steps
            if counted.get(key) != now and not (longer and not backend.fixed_steps):
                made = f"{backend.option.format(key)} {counted.get(key)}, not {now}"
                why = f": {backend.fixed_steps}" if longer else ""
                raise MolsCheckpointError(f"--resume: the checkpoint was made with {made}{why}")
        self.updates, self.probe_steps = int(counted["step"]), int(counted["probe_steps"])
        if self.job.changed or self.job.steps != steps:
            self.use_settings(steps)
        self.ahead = int(counted.get("ahead", 0))
        self.saved = step_of(tag or "")
        self.alphas_seen = backend.mols.alphas
        load_places(self.job.batches, self.folder / (tag or f"step{self.updates}"))
        if self.metrics is not None:
            self.guarded("metrics", partial(self.metrics.rewind, self.updates))

    def use_settings(self, steps: int) -> None:
        """Apply this run's settings to the loaded checkpoint of a run of `steps` steps, and print the rate."""
        before = self.backend.base_lr()
        self.backend.use_settings()
        after = self.backend.base_lr()
        if self.job.rank != 0 or (steps == self.job.steps and before == after):
            return
        extended = f"extended from {steps} to {self.job.steps} steps; " if steps != self.job.steps else ""
        rate = f"stays {after:.4g}" if before == after else f"is {after:.4g} instead of {before:.4g}"
        tell(f"--resume: {extended}by this run's schedule the rate of step {self.updates + 1} {rate}")

    # -- training

    def run(self) -> Outcome:
        """Train to the last update."""
        job = self.job
        if self.metrics is not None and not job.resume:
            self.guarded("metrics", self.metrics.clear)
        val_loss = None
        while self.updates < job.steps and not self.diverged:
            val_loss = self.step()
            if job.preemptible and self.updates < job.steps:
                self.stop_on_signal()
        if self.diverged:
            val_loss = math.nan
        if val_loss is None:  # resumed at the end
            val_loss = self.backend.evaluate()
        if job.rank == 0 and job.shown and self.waited.share is not None:
            tell(f"{job.out.name}: {self.waited.share:.1%} of the steps' time was spent waiting for data")
        if job.save_at_end and self.saved != self.updates:
            self.save()
        return self._outcome(val_loss)

    def stop_on_signal(self) -> None:
        """Save and raise Preempted if any rank got a signal."""
        name = self.stop.agreed(self.backend.largest)
        if name is None:
            return
        self.save()
        raise Preempted(f"stopped by {name} after step {self.updates}; --resume continues from there")

    def step(self) -> float | None:
        """Run one step of the engine. Returns the held-out loss if it was evaluated."""
        job, backend = self.job, self.backend
        began = time.monotonic()
        measures = bool(self.probes) and backend.mols.phase == "calibrating"
        stream: Stream = "probe" if measures and not job.probe_ahead else "train"
        position = self.probe_steps if stream == "probe" else self.updates + (self.ahead if measures else 0)
        base_lr = backend.base_lr()
        batches = self.waited.timed(job.batches.step(stream, position))
        losses, updated = backend.step(batches, number=self.updates + 1, measures=measures)
        seconds = time.monotonic() - began
        self.waited.seconds_of_steps += seconds
        if not updated:
            self.probe_steps += 1
            self.ahead += job.probe_ahead
            self.guarded("progress", partial(self.bar.probing, self.probe_steps, self.probes))
            return None
        self.updates += 1
        self.ahead = 0
        self.unlogged.updates, self.unlogged.seconds = self.unlogged.updates + 1, self.unlogged.seconds + seconds
        if self.trace is not None:
            self.guarded("profile", self.trace.step)
        backend.after_update()
        return self._after_update(losses, base_lr, seconds)

    def _after_update(self, losses: Tensor, base_lr: float, seconds: float) -> float | None:
        """Evaluate, log and save as the job asks after this update. Returns the held-out loss, if any."""
        job, backend, now = self.job, self.backend, self.updates
        due = now >= job.steps or (job.eval_every and now % job.eval_every == 0)
        val_loss = backend.evaluate() if due else None
        read = backend.snr()
        if now % job.log_every == 0 or val_loss is not None or read is not None:
            loss = backend.mean_loss(losses)
            self.diverged = job.stop_diverged and not math.isfinite(loss)
            self.log(loss, val_loss, base_lr, seconds, read)
        if job.save_every and now % job.save_every == 0:
            self.save()
        return val_loss

    def log(
        self, loss: float, val_loss: float | None, base_lr: float, seconds: float, read: Mapping[str, float] | None
    ) -> None:
        """Write a line of metrics.

        Args:
            base_lr: learning rate of this update without multipliers.
            read: SNR of each group from Adam's moments.
        """
        if self.job.rank == 0:
            line = self._line(loss, val_loss, base_lr, seconds)
            if read is not None:
                line["snr_moments"] = dict(read)
            if self.metrics is not None:
                self.guarded("metrics", partial(self.metrics.write, line))
            self.guarded("monitor", partial(self.backend.write_events, events(line, self.backend.mols.alphas)))
            self.guarded("progress", partial(self.bar.update, line))
        self.unlogged = Interval()

    def _line(self, loss: float, val_loss: float | None, base_lr: float, seconds: float) -> JsonObject:
        mols, backend = self.backend.mols, self.backend
        line: JsonObject = {"step": self.updates, "tokens": backend.tokens(self.updates), "loss": loss}
        if val_loss is not None:
            line["val_loss"] = val_loss
        line |= {"lr": base_lr, "multipliers": mols.multipliers, "phase": mols.phase}
        line["step_seconds"] = round(seconds, 6)
        norm = backend.grad_norm()
        if norm is not None:
            line["grad_norm"] = norm
        tokens = line["tokens"] - backend.tokens(self.updates - self.unlogged.updates)
        line["tokens_per_second"] = tokens / self.unlogged.seconds
        line["memory_bytes"] = peak_memory(backend.device)
        if self.peak is not None:
            line["mfu"] = line["tokens_per_second"] / self.peak
        if mols.phase != "disabled":
            line["applied_lrs"] = mols.applied_lrs
        snr = self._new_snr()
        return line if snr is None else {**line, "snr": snr}

    def _new_snr(self) -> dict[str, float] | None:
        """Return the SNR of each group, once after each calibration; None otherwise, and for fixed alphas."""
        alphas = self.backend.mols.alphas
        if alphas == self.alphas_seen:
            return None
        self.alphas_seen = alphas
        groups = self.backend.mols.report().get("groups", {})
        return {group: values["snr"] for group, values in groups.items()} or None

    def _outcome(self, val_loss: float) -> Outcome:
        section = self.job.setup.section
        outcome = Outcome(val_loss, self.backend.tokens(self.updates), dict(self.backend.mols.alphas))
        outcome.probe_steps = self.probe_steps
        if outcome.alphas and section is not None:
            report = Path(section["report_dir"]) / "mols_report.json"
            outcome.report = report if report.is_file() else None
        if self.metrics is not None:
            last = {"val_loss": val_loss, "val_ppl": outcome.val_ppl}
            line = {"final": True, **last, "tokens": outcome.tokens, "alphas": outcome.alphas}
            self.guarded("metrics", partial(self.metrics.write, line))
        return outcome


@dataclass
class Interval:
    """Updates, and their seconds, since the last line of metrics."""

    updates: int = 0
    seconds: float = 0.0


def peak_rate(backend: TrainBackend) -> float | None:
    """Return the tokens a second of all ranks at the devices' nominal FLOP/s; None if they are not known."""
    flops, peak = backend.flops_per_token(), backend.peak_flops()
    return None if flops is None or peak is None else backend.world * peak / flops


def events(line: JsonObject, alphas: Mapping[str, float]) -> dict[str, float]:
    """Return a line of metrics as flat numbers for TensorBoard and W&B, and the alphas."""
    plain = {key: line[key] for key in EVENTS if key in line}
    by_group: dict[str, Mapping[str, float]] = {"alpha": alphas, "multiplier": line["multipliers"]}
    by_group |= {name: line.get(key, {}) for name, key in GROUP_EVENTS.items()}
    flat = {f"{kind}_{group}": value for kind, values in by_group.items() for group, value in values.items()}
    return plain | {name: value for name, value in flat.items() if value is not None}


def probe_samples(section: JsonObject | None) -> int:
    """Return how many batches (at most) a calibration measures without an update: 0 in all modes but "probe"."""
    config = None if section is None else MolsConfig.parse(section)
    if config is None or config.mode != "probe":
        return 0
    return config.max_samples if config.samples == "auto" else config.samples


class Metrics:
    """OUT/metrics.jsonl: one JSON object per line, flushed at once. The first line has `about` under "run"."""

    def __init__(self, path: Path, about: JsonObject | None = None) -> None:
        self.path, self.about, self.empty = path, about, True

    def clear(self) -> None:
        """Start an empty file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, "")

    def write(self, line: dict[str, object]) -> None:
        """Append a line."""
        first = {"run": self.about} if self.empty and self.about else {}
        append(self.path, json.dumps(line | first) + "\n")
        self.empty = False

    def rewind(self, step: int) -> None:
        """Drop the lines of an interrupted run after the checkpoint at `step`."""
        entries = read_lines(self.path) if self.path.is_file() else []
        kept = [entry for entry in entries if entry.get("step", step + 1) <= step]
        write_whole(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self.empty = not kept


def read_lines(path: Path) -> list[JsonObject]:
    """Return the objects of a JSONL file such as metrics.jsonl. Skips invalid lines of a process killed while it wrote.
    Raises MolsConfigError if the file cannot be read."""
    entries = []
    for line in read_text(path, str(path)).splitlines():
        with contextlib.suppress(MolsConfigError):
            entry = parse_json(line, str(path))
            if isinstance(entry, dict):
                entries.append(entry)
    return entries
