"""The training loop of train_megatron.py: one arm, from its first step to its last, with everything it writes."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megatron_patches
from megatron_patches.machine import Machine
from megatron_patches.rng_state import RandomState
from mols_ds.apps.train_megatron.checkpoint import Checkpoints
from mols_ds.apps.train_megatron.dataset import Batch, IndexedBatches
from mols_ds.core.config import MolsConfig
from mols_ds.errors import MolsCheckpointError, MolsError
from mols_ds.training.batches import BatchShape, Stream
from mols_ds.training.checkpointer import refuse_non_finite
from mols_ds.training.megatron_build import Built, build
from mols_ds.training.megatron_config import ProcessGrid, transformer_config
from mols_ds.training.megatron_settings import Settings
from mols_ds.training.preemption import Preempted, StopRequest
from mols_ds.training.progress import Progress
from mols_ds.training.trainer import CHECKPOINTS, METRICS, Metrics, Outcome

GIVE_UP_AFTER = 50
"""Iterations in a row that Megatron may skip (the gradients are not finite) before the run ends."""


@dataclass(frozen=True)
class Arm:
    """What one arm trains and how, the same on every rank."""

    settings: Settings
    machine: Machine
    grid: ProcessGrid
    batches: IndexedBatches
    held_out: list[Batch]
    shape: BatchShape
    vocab_size: int
    engine: bool
    rank: int
    out: Path
    eval_every: int
    resume: bool = False


def train(arm: Arm) -> Outcome:
    """Train one arm to its last step. Returns its outcome, the same on every rank.

    Raises MolsConfigError, MolsUnsupportedError and MolsCheckpointError for what the user got wrong, MolsTrainingError
    where the weights are not finite when they are to be saved, and Preempted after the checkpoint of a run that was
    asked to end.
    """
    started = time.monotonic()
    # A config of its own for each arm: Megatron's schedules find functions of the optimizer on it
    config = transformer_config(arm.settings, arm.machine)
    built = build(arm.settings, config, vocab_size=arm.vocab_size, engine=arm.engine)
    mols = None
    if arm.settings.mols is not None:
        mols = megatron_patches.attach(
            built.chunks, built.optimizer, built.scheduler, arm.settings.mols, samples_per_step=arm.settings.batch.total
        )
    loop = _Loop(arm, built, mols)
    try:
        if arm.resume:
            loop.load()
        with loop.stop:
            outcome = loop.run()
    finally:
        loop.close()
        if mols is not None:
            mols.detach()
        del built, mols, loop
        gc.collect()
    outcome.seconds = time.monotonic() - started
    return outcome


class _Loop:
    """Counts updates itself: an iteration that MoLS only measures moves neither the step nor the schedule, so that the
    run trains exactly `run.steps` updates whatever the mode. An iteration that Megatron skips does count, as in
    Megatron-LM."""

    def __init__(self, arm: Arm, built: Built, mols: Any) -> None:
        self.arm, self.built, self.mols = arm, built, mols
        self.run_settings = arm.settings.run
        self.now = self.probe_steps = self.skipped = 0
        self.stop = StopRequest()
        first = arm.rank == 0
        self.metrics = Metrics(arm.out / METRICS) if first else None
        self.bar = Progress(arm.out.name, self.run_settings.steps, shown=first)
        self.checkpoints = Checkpoints(
            arm.out / CHECKPOINTS, built, mols, reshardable=self.run_settings.reshardable_checkpoints
        )
        self.probes = mols is not None and MolsConfig.parse(arm.settings.mols or {}).mode == "probe"

    def close(self) -> None:
        self.bar.close()

    # -- checkpoints

    def save(self) -> None:
        weights = (parameter for chunk in self.built.chunks for parameter in chunk.parameters())
        refuse_non_finite(weights, self.now, lambda fine: not self.largest(float(not fine)))
        counted = {"probe_steps": self.probe_steps, "steps": self.run_settings.steps, "seed": self.run_settings.seed}
        self.checkpoints.save(self.now, counted)

    def load(self) -> None:
        counted = self.checkpoints.load()
        for key in ("steps", "seed"):
            now = getattr(self.run_settings, key)
            if counted[key] != now:
                raise MolsCheckpointError(f"--resume: the checkpoint was made with run.{key} {counted[key]}, not {now}")
        self.now, self.probe_steps = int(counted["step"]), int(counted["probe_steps"])
        if self.metrics is not None:
            self.metrics.rewind(self.now)

    # -- training

    def run(self) -> Outcome:
        plan = self.run_settings
        if self.metrics is not None and not self.arm.resume:
            self.metrics.clear()
        val_loss, saved = None, self.now if self.arm.resume else -1
        while self.now < plan.steps:
            before = self.now
            val_loss = self.step()
            if self.now != before and plan.save_every and self.now % plan.save_every == 0:
                self.save()
                saved = self.now
            if self.now < plan.steps:
                self.heed()
        if val_loss is None:  # resumed at the end
            val_loss = self.evaluate()
        if saved != self.now:
            self.save()
        return self._outcome(val_loss)

    def heed(self) -> None:
        """Save and raise Preempted where any rank was asked to end."""
        name = self.stop.agreed(self.largest)
        if name is None:
            return
        self.save()
        raise Preempted(f"stopped by {name} after step {self.now}; --resume goes on from there")

    def _outcome(self, val_loss: float) -> Outcome:
        outcome = Outcome(val_loss, self.now * self.arm.shape.tokens, dict(getattr(self.mols, "alphas", {})))
        outcome.probe_steps = self.probe_steps
        if outcome.alphas:
            report = Path((self.arm.settings.mols or {})["report_dir"]) / "mols_report.json"
            outcome.report = report if report.is_file() else None
        if self.metrics is not None:
            last = {"val_loss": val_loss, "val_ppl": outcome.val_ppl}
            self.metrics.write({"final": True, **last, "tokens": outcome.tokens, "alphas": outcome.alphas})
        return outcome

    def step(self) -> float | None:
        """One iteration, logged where it was an update. Returns the held-out loss if it was evaluated."""
        arm, built, plan = self.arm, self.built, self.run_settings
        began = time.monotonic()
        probing = self.probes and self.mols.phase == "calibrating"
        stream: Stream = "probe" if probing else "train"
        rate = float(built.optimizer.param_groups[0]["lr"])
        for chunk in built.chunks:
            chunk.zero_grad_buffer()
        built.optimizer.zero_grad()
        sums = self._pass(arm.batches.step(stream, self.probe_steps if probing else self.now), arm.shape.accumulation)
        successful, *_ = built.optimizer.step()
        if probing:
            self.probe_steps += 1
            self.bar.probing(self.probe_steps)
            return None
        self._count(bool(successful))
        seconds = time.monotonic() - began
        last = self.now >= plan.steps
        evaluated = self.evaluate() if last or (arm.eval_every and self.now % arm.eval_every == 0) else None
        if self.now % plan.log_every == 0 or evaluated is not None:
            total, count = self.total(sums).tolist()
            self.log(self.now, total / count, evaluated, rate, seconds)
        return evaluated

    def _count(self, successful: bool) -> None:
        """After an iteration: the schedule moves on where it was an update."""
        self.now += 1
        self.skipped = 0 if successful else self.skipped + 1
        if successful:
            self.built.scheduler.step(increment=self.arm.settings.batch.total)
        elif self.skipped >= GIVE_UP_AFTER:
            raise MolsError(
                f"{self.skipped} iterations in a row were skipped up to step {self.now}: the gradients are not finite; "
                "take a smaller optimizer.lr, or bf16 in the place of fp16"
            )

    def _pass(self, batches: Iterator[Batch], number: int, *, forward_only: bool = False) -> Tensor:
        """Forward (and backward) of `number` micro-batches by the schedule that fits the grid.

        Returns [sum of the losses, number of targets] of what this rank computed, float64: zeros but on the last
        stage's first tensor-parallel rank.
        """
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        chunks, shape = self.built.chunks, self.arm.shape
        # Every chunk of an interleaved stage asks for each micro-batch, and only the first and the last use it
        every = list(batches) if len(chunks) > 1 else None
        iterators: Any = batches if every is None else [iter(every) for _ in chunks]
        found = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iterators,
            model=chunks,
            num_microbatches=number,
            seq_length=shape.length,
            micro_batch_size=shape.micro,
            forward_only=forward_only,
        )
        sums = torch.zeros(2, dtype=torch.float64)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            for one in found or ():
                sums += one["sums"].to("cpu", torch.float64)
        return sums

    def log(self, step: int, loss: float, val_loss: float | None, rate: float, seconds: float) -> None:
        """`rate` is the base rate that this step was taken with, before any module's multiplier."""
        phase = getattr(self.mols, "phase", "disabled")
        line: dict[str, Any] = {"step": step, "tokens": step * self.arm.shape.tokens, "loss": loss}
        if val_loss is not None:
            line["val_loss"] = val_loss
        line |= {"lr": rate, "multipliers": dict(getattr(self.mols, "multipliers", {})), "phase": phase}
        line["step_seconds"] = round(seconds, 6)
        if self.metrics is not None:
            self.metrics.write(line)
        self.bar.update(step, loss, val_loss, phase)

    def largest(self, value: float) -> float:
        """The maximum over all ranks."""
        if self.arm.grid.world == 1:
            return value
        moved = torch.tensor([value], dtype=torch.float32, device=_device())
        torch.distributed.all_reduce(moved, op=torch.distributed.ReduceOp.MAX)
        return float(moved)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks of a float64 vector, on the CPU."""
        if self.arm.grid.world == 1:
            return values
        moved = values.to(_device())
        torch.distributed.all_reduce(moved)
        return moved.cpu()

    def evaluate(self) -> float:
        """Mean loss a token over all held-out sequences. Training's random numbers go on as if it had not been."""
        random = RandomState()
        random.remember()
        for chunk in self.built.chunks:
            chunk.eval()
        with torch.no_grad():
            held_out = self.arm.held_out
            sums = self._pass(iter(held_out), len(held_out), forward_only=True)
        for chunk in self.built.chunks:
            chunk.train()
        random.restore()
        loss, count = self.total(sums).tolist()
        return float(loss / count)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _forward_step(iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    """One micro-batch through one chunk, in the form that Megatron's schedules want (pretrain_gpt.py)."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    batch = next(iterator)
    if torch.cuda.is_available():
        batch = {key: value.to(_device(), non_blocking=True) for key, value in batch.items()}
    if parallel_state.get_context_parallel_world_size() > 1:
        batch = get_batch_on_this_cp_rank(batch)
    mask = batch["loss_mask"]
    more = {"loss_mask": mask} if getattr(model.config, "mtp_num_layers", None) else {}
    # Without an attention mask the layers, which are causal, make their own
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], **more)

    def loss_of(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum of the masked losses, number of targets; losses: (micro, length), or flat."""
        summed = torch.sum(losses.reshape(-1).float() * mask.reshape(-1))
        count = mask.sum()
        return summed, count.to(torch.int), {"sums": torch.stack([summed.detach(), count])}

    return output, loss_of
