"""A loop of Accelerate over DeepSpeed or plain torch, as its documentation has it: one run, and what came of it."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, skip_first_batches
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import GeneralTracker
from accelerate.utils import ProjectConfiguration
from transformers import get_linear_schedule_with_warmup, set_seed

import mols_ds
from mols_ds.integrations.accelerate import attach, log_values
from tests.integrations.own_loop import MICROS, SAVE, WINDOW, evaluate
from tests.integrations.runs import (
    LR,
    PLAIN,
    STEPS,
    WARMUP,
    Examples,
    Plain,
    Run,
    end_of,
    kept_in,
    kinds_of,
    model,
    phase_of,
    saved_in,
    zero_section,
)

CLIP = 1.0  # below most of the gradient norms
SCALER: torch.amp.GradScaler | None = None


def use_scaler(accelerator: Accelerator, scaler: torch.amp.GradScaler) -> None:
    """As in mixed precision "fp16", which Accelerate refuses on a CPU, but in fp32. Call it before `prepare`."""
    accelerator.scaler = scaler
    accelerator.unscale_gradients = lambda: [scaler.unscale_(one.optimizer) for one in accelerator._optimizers]


class Tracker(GeneralTracker):  # type: ignore[misc]
    """Keeps what `accelerator.log` is given."""

    name = "rows"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    @property
    def tracker(self) -> Tracker:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        self.rows.append({"update": step, **values})


class Progress:
    """Where the loop is; in the checkpoints of Accelerate."""

    updates, iteration = 0, 0

    def state_dict(self) -> dict[str, int]:
        return {"updates": self.updates, "iteration": self.iteration}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates, self.iteration = state["updates"], state["iteration"]


class Loop:
    """The usual objects; `how`: "attach", "patch", "both", or "config" (the section is there, and no MoLS)."""

    def __init__(self, run: Run, how: str) -> None:
        for state in (AcceleratorState, GradientState):
            state._reset_state()
        PartialState(cpu=True)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
            "gradient_accumulation_steps": MICROS,
            "gradient_clipping": CLIP,
            "zero_optimization": zero_section(run.stage),
            "steps_per_print": 10**9,
        }
        if how != "attach" and run.section is not None:
            config["mols"] = run.section
        if how in ("patch", "both"):
            mols_ds.patch()
        self.run, self.tracker, self.progress = run, Tracker(), Progress()
        self.plain = run.stage == PLAIN
        self.accelerator = Accelerator(
            deepspeed_plugin=None if self.plain else DeepSpeedPlugin(hf_ds_config=config),
            cpu=self.plain,
            gradient_accumulation_steps=MICROS,
            project_config=ProjectConfiguration(run.out, automatic_checkpoint_naming=run.evaluate, total_limit=2),
            log_with=self.tracker,
        )
        if SCALER is not None:
            use_scaler(self.accelerator, SCALER)
        self.accelerator.init_trackers("run")
        set_seed(0)
        net = model()
        inner = torch.optim.AdamW(net.parameters(), lr=LR)
        times = self.accelerator.num_processes  # Accelerate steps a schedule once for each process
        plan = get_linear_schedule_with_warmup(inner, WARMUP * times, STEPS * times)
        self.rows = Examples()
        # of its own: an iterator draws a seed, and a resumed run makes one more
        loader = torch.utils.data.DataLoader(self.rows, batch_size=1, generator=torch.Generator())
        self.net, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(net, inner, loader, plan)
        self.mols = None
        if how in ("attach", "both") and run.section is not None:
            section = None if how == "both" else run.section
            more: dict[str, Any] = {"accelerator": self.accelerator} if self.plain else {}
            self.mols = attach(self.net, section, scheduler=self.scheduler, optimizer=self.optimizer, **more)
        if how in ("patch", "both"):
            mols_ds.unpatch()
        self.accelerator.register_for_checkpointing(self.progress)
        if run.resume is not None:
            self.accelerator.load_state(f"{run.saved}/{run.resume}")
        self.seen: dict[str, Any] = {"counts": [], "lrs": [], "phases": [], "saved": {}, "skipped": []}
        self.evaluations: list[float] = []

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine; without DeepSpeed an object with the same attributes."""
        return Plain(self.net, self.mols, self.progress.updates) if self.plain else self.net

    def train(self) -> None:
        """STEPS updates, in epochs. A run without MoLS leaves out the batches that one with MoLS only measures."""
        progress = self.progress
        epoch = len(self.loader) // MICROS  # iterations
        while progress.updates < STEPS:
            done = MICROS * (progress.iteration % epoch)
            loader = skip_first_batches(self.loader, done) if done else self.loader
            for number, batch in enumerate(loader):
                if progress.updates == STEPS:
                    break
                if self.run.section is None and progress.iteration in WINDOW:
                    progress.iteration += number % MICROS
                    continue
                self._micro(batch)

    def _micro(self, batch: Any) -> None:
        accelerator, progress, seen = self.accelerator, self.progress, self.seen
        with accelerator.accumulate(self.net):
            lr = float(self.scheduler.get_last_lr()[0])
            accelerator.backward(self.net(**batch).loss)
            if self.plain and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.net.parameters(), CLIP)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        if not accelerator.sync_gradients:
            return
        progress.iteration += 1
        if accelerator.optimizer_step_was_skipped:
            seen["skipped"].append(progress.iteration - 1)
        else:
            progress.updates += 1
            seen["counts"].append((progress.updates, self.engine.global_steps, self.engine.micro_steps))
            seen["lrs"].append(lr)
            seen["phases"].append(phase_of(self.engine))
            engine = self.engine
            keys = log_values(engine.mols) if hasattr(engine, "mols") else {}
            accelerator.log({"lr": lr, **keys}, step=progress.updates)
            if self.run.evaluate and progress.updates % 3 == 0:
                self.evaluations.append(evaluate(self.net, self.rows.rows[0][None]))
                accelerator.save_state()
        for part, stop in SAVE.items():
            if self.run.save and progress.iteration == stop:
                seen["saved"][part] = saved_in(self.engine, progress.updates)
                accelerator.save_state(f"{self.run.out}/{part}")

    def end(self) -> dict[str, Any]:
        """What the run came to."""
        kept = kept_in(self.run.out, "checkpoints/*")
        same = {"evaluations": self.evaluations, "kept": kept, "iterations": self.progress.iteration}
        self.seen["kinds"] = kinds_of(self.net)
        return {**self.seen, **end_of(self.engine), "logs": self.tracker.rows, "same": same}


def train(run: Run, how: str = "attach") -> dict[str, Any]:
    """One run to its end."""
    loop = Loop(run, how)
    loop.train()
    return loop.end()
