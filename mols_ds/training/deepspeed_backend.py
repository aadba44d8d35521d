"""DeepSpeed backend of the training loop (`mols_ds.training.trainer`)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mols_ds.core.config import MolsConfig
from mols_ds.core.handle import Handle
from mols_ds.core.json_types import JsonObject
from mols_ds.core.log import GuardedWriter
from mols_ds.errors import MolsCheckpointError, MolsConfigError
from mols_ds.training.batches import MicroBatch
from mols_ds.training.ds_config import model_dtype
from mols_ds.training.param_groups import group_options, restore_options
from mols_ds.training.rng_state import load_random, save_random
from mols_ds.training.speed import device_name, flops_per_token, peak_flops
from mols_ds.training.task import Task
from mols_ds.training.train_job import StepResult, TrainBackend, TrainJob

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

CLIENT_KEY = "main_job"
"""Key of the loop's counters in a checkpoint's client state."""
WARMUP_SHARE, FINAL_SHARE = 0.10, 0.10
"""The paper's schedule (METHOD.md): linear warm-up over 10 % of the steps, then cosine to 10 % of the base rate."""


def schedule(steps: int) -> Callable[[int], float]:
    """Return the factor on the base rate at each step (from 0): (t + 1) / w for the w warm-up steps, then cosine."""
    warmup = max(1, round(WARMUP_SHARE * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step + 1 - warmup) / max(1, steps - warmup))
        return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


@dataclass(frozen=True)
class DeepSpeedSetup:
    """Builds a DeepSpeed engine. See `train_job.TrainSetup`.

    Attributes:
        config: a resolved DeepSpeed config.
        model: builds the model of an arm.
        held_out: this rank's held-out micro-batches, with the number of valid sequences in each.
        task: defines micro-batches and their loss.
        watch: called with the engine after every update.
        compiler: backend of torch.compile for the model; None: not compiled.
    """

    config: JsonObject
    model: Callable[[], nn.Module]
    held_out: Sequence[tuple[MicroBatch, int]]
    task: Task
    watch: Callable[[DeepSpeedEngine], None] | None = None
    compiler: str | None = None

    @property
    def section(self) -> JsonObject | None:
        """See `TrainSetup`."""
        return self.config.get("mols")

    @property
    def optimizer(self) -> str:
        """See `TrainSetup`."""
        return str(self.config["optimizer"]["type"])

    def with_section(self, section: JsonObject | None) -> DeepSpeedSetup:
        """See `TrainSetup`."""
        config = copy.deepcopy(self.config)
        if section is None:
            config.pop("mols", None)
        else:
            config["mols"] = copy.deepcopy(section)
        return replace(self, config=config)

    def build(self, job: TrainJob) -> DeepSpeedBackend:
        """See `TrainSetup`. Without a "scheduler" in the config, the learning rate follows `schedule`."""
        import mols_ds

        model = self.model()
        rates: dict[str, Callable[[torch.optim.Optimizer], LambdaLR]] = {}
        if "scheduler" not in self.config:
            rates["lr_scheduler"] = lambda optimizer: LambdaLR(optimizer, schedule(job.steps))
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine, *_ = mols_ds.initialize(model=model, model_parameters=trainable, config=self.config, **rates)
        if self.compiler is not None:
            engine.compile(backend=self.compiler)
        torch.manual_seed(job.seed + 1 + job.shape.rank)  # different dropout on each rank
        return DeepSpeedBackend(job, self, engine)


Event = tuple[str, float, int]
"""(name, value, number of samples)."""


class DeepSpeedBackend(TrainBackend):
    """See `TrainBackend`. `global_steps` does not advance during a probe, which tells it from an update."""

    option = "--{}"

    def __init__(self, job: TrainJob, setup: DeepSpeedSetup, engine: DeepSpeedEngine) -> None:
        self.job, self.setup, self.task, self.engine = job, setup, setup.task, engine
        self.mols: Handle = engine.mols
        self.rank, self.world, self.device = job.shape.rank, job.shape.world, engine.device
        self._monitor = self._guarded_monitor()
        options = setup.config.get("checkpoint") or {}
        self.universal = bool(options.get("load_universal"))
        self.node_local = bool(options.get("use_node_local_storage"))
        if engine.checkpoint_engine.is_decoupled():
            raise MolsConfigError(
                '"checkpoint.writer.decoupled" still writes after the save has returned, but this loop renames the '
                "folder then: leave it out"
            )

    @property
    def identity(self) -> Mapping[str, object]:
        """See `TrainBackend`."""
        return self.task.identity

    # -- training

    def base_lr(self) -> float:
        """See `TrainBackend`."""
        lr: float = self.engine.get_lr()[0]
        return lr

    def step(self, batches: Iterator[MicroBatch], *, number: int, measures: bool) -> StepResult:
        """See `TrainBackend`. `losses` is the mean over this rank's micro-batches, a scalar."""
        engine = self.engine
        before = engine.global_steps
        summed = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            loss = self.task.loss(engine, batch)
            engine.backward(loss)
            summed += loss.detach().to("cpu", torch.float64)
            engine.step()
        return StepResult(summed / self.job.shape.accumulation, engine.global_steps != before)

    def grad_norm(self) -> float | None:
        """See `TrainBackend`."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def snr(self) -> dict[str, float] | None:
        """See `TrainBackend`. By the estimator of the "mols" section."""
        from mols_ds.engines.deepspeed.snr_monitor import SnrWatch

        watch = self.setup.watch
        if not isinstance(watch, SnrWatch) or watch.steps[-1:] != [self.engine.global_steps]:
            return None
        return watch.reading()["curves"][MolsConfig.parse(self.setup.section or {}).estimator]

    def flops_per_token(self) -> float | None:
        """See `TrainBackend`. None if some weights are frozen, and for experts: not every token passes all."""
        module = self.engine.module
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]
        config: Any = getattr(module, "config", None)
        if not all(trained for _, trained in sizes) or not hasattr(config, "num_hidden_layers"):
            return None
        if any(hasattr(config, key) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
            return None
        looked_up = 0 if config.tie_word_embeddings else module.get_input_embeddings().num_embeddings
        weights = sum(size for size, _ in sizes) - looked_up * config.hidden_size
        return flops_per_token(weights, config.num_hidden_layers, config.hidden_size, self.job.shape.length)

    def peak_flops(self) -> float | None:
        """See `TrainBackend`."""
        return peak_flops(device_name(self.device), model_dtype(self.setup.config))

    def mean_loss(self, losses: Tensor) -> float:
        """See `TrainBackend`: the mean over ranks."""
        return float(self.total(losses.reshape(1))[0]) / self.world

    def held_out_sums(self) -> Tensor:
        """See `TrainBackend`."""
        engine = self.engine
        sums = torch.zeros(2, dtype=torch.float64)
        engine.eval()
        with torch.no_grad():
            for batch, valid in self.setup.held_out:
                sums += torch.tensor(self.task.held_out(engine, batch, valid), dtype=torch.float64)
        engine.train()
        return sums

    def tokens(self, steps: int) -> int:
        """See `TrainBackend`."""
        return self.task.tokens(steps)

    def parameters(self) -> Iterable[Tensor]:
        """See `TrainBackend`."""
        parameters: Iterable[Tensor] = self.engine.module.parameters()
        return parameters

    def after_update(self) -> None:
        """See `TrainBackend`."""
        if self.setup.watch is not None:
            self.setup.watch(self.engine)

    def write_events(self, values: Mapping[str, float]) -> None:
        """See `TrainBackend`. Writes to DeepSpeed's monitor, by number of samples."""
        if self._monitor is not None:
            samples = self.engine.global_samples
            self._monitor([(f"Train/Samples/{name}", value, samples) for name, value in values.items()])

    def _guarded_monitor(self) -> Callable[[list[Event]], None] | None:
        """Replace and return the function that writes DeepSpeed's events on rank 0, or None. DeepSpeed calls it within
        a step too, where it must not raise."""
        monitor = getattr(self.engine, "monitor", None)
        if self.rank != 0 or monitor is None or not monitor.enabled:
            return None
        stock, guarded = monitor.write_events, GuardedWriter()

        def write_events(events: list[Event]) -> None:
            guarded("monitor", lambda: stock(events))

        monitor.write_events = write_events
        return write_events

    # -- checkpoints

    def checkpoint_writer(self, step: int, counted: JsonObject) -> Callable[[Path], None]:
        """See `TrainBackend`."""
        job, engine, task = self.job, self.engine, self.task

        def write(place: Path) -> None:
            engine.save_checkpoint(
                str(place.parent), tag=place.name, client_state={CLIENT_KEY: counted}, save_latest=False,
                exclude_frozen_parameters=task.partial,
            )  # fmt: skip
            save_random(place, self.rank, self.world)
            task.save(engine, job.out if step >= job.steps else place)

        return write

    def load_checkpoint(self, folder: Path, tag: str | None) -> JsonObject | None:
        """See `TrainBackend`. Without a tag, loads the checkpoint in DeepSpeed's `latest_universal`."""
        self._options = group_options(self.engine.optimizer.param_groups)
        self._base_lrs = list(getattr(self.engine.lr_scheduler, "base_lrs", []))
        try:
            strict = not self.task.partial
            path, client = self.engine.load_checkpoint(str(folder), tag=tag, load_module_strict=strict)
        except (OSError, EOFError, KeyError, RuntimeError, ValueError, AssertionError) as error:
            if isinstance(error, MolsCheckpointError):
                raise
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise MolsCheckpointError(f"--resume: the checkpoint in {folder} cannot be loaded: {line}") from error
        counted = (client or {}).get(CLIENT_KEY)
        if path is None or counted is None:
            return None
        load_random(Path(path).parent, self.rank, self.world)
        return {**counted, "step": self.engine.global_steps}

    def use_settings(self) -> None:
        """See `TrainBackend`. torch's and DeepSpeed's optimizers and torch's schedulers load their settings."""
        groups, scheduler = self.engine.optimizer.param_groups, self.engine.lr_scheduler
        restore_options(groups, self._options)
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = list(self._base_lrs)
            for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
                group["initial_lr"], group["lr"] = base, base * factor(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in groups]
        elif scheduler is not None and scheduler.last_batch_iteration >= 0:
            scheduler.step(scheduler.last_batch_iteration)

    def close(self) -> None:
        """See `TrainBackend`."""
        self.mols.detach()
        self.engine.destroy()
