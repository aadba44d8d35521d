"""Runs a scenario on one rank of a real DeepSpeed engine, and takes a snapshot after each action."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

import mols_ds
from mols_ds.errors import MolsError, MolsWarning
from tests.engines.deepspeed.engines import OFFLOAD, config
from tests.engines.deepspeed.state import full_weights, inner_optimizer, step_first_group_only
from tests.helpers.digests import digest
from tests.scenarios.model import batch, random_state, tiny
from tests.scenarios.reference import VECTOR_FACTOR, schedule
from tests.scenarios.reference_optimizer import FP16_POWER, FP16_WINDOW
from tests.scenarios.scenario import (
    Action,
    Attach,
    BreakOptimizer,
    Detach,
    EditRate,
    Evaluate,
    Freeze,
    Load,
    RunSettings,
    Save,
    Scenario,
    Section,
    Step,
)
from tests.scenarios.snapshot import Snapshot
from tests.scenarios.user_optimizers import optimizer_of

SIZES = {"sub_group_size": 700, "stage3_param_persistence_threshold": 20}  # elements; the model has several sub-groups
NO_PLOT = "mols_report.png was not drawn"  # ranks of tests have no matplotlib


def groups_of(model: nn.Module, settings: RunSettings) -> list[dict[str, Any]]:
    """The user's parameter groups."""
    params = list(model.parameters())
    if not settings.split:
        return [{"params": params, "lr": settings.lr, "weight_decay": settings.decay}]
    matrices, vectors = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
    return [
        {"params": matrices, "lr": settings.lr, "weight_decay": settings.decay},
        {"params": vectors, "lr": settings.lr * VECTOR_FACTOR, "weight_decay": 0.0},
    ]


class DeepSpeedRun:
    """The training program of one rank."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.seed, self.settings, self.folder = scenario.seed, scenario.settings, folder
        self.rank = dist.get_rank()
        self.batches = self.seedings = self.reports = 0
        self.broken = False
        self._reseed()
        self._build(self.settings.section)

    def _with_report_folder(self, section: Section) -> Section:
        """A report folder for each engine: two engines in one folder get a warning."""
        self.reports += 1
        return {**section, "report_dir": f"report{self.seed}.{self.reports}"}

    def _reseed(self) -> None:
        self.seedings += 1
        torch.manual_seed(random_state(self.seed, self.seedings, self.rank))

    def _build(self, section: Section | None) -> None:
        settings = self.settings
        self.model = tiny(self.seed)
        for name in settings.frozen:
            self.model.get_parameter(name).requires_grad_(False)
        optimizer = optimizer_of(settings, groups_of(self.model, settings))
        more: dict[str, Any] = {}
        if settings.scheduled:
            more["lr_scheduler"] = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        zero = {**(SIZES if settings.stage == 3 else {}), **(OFFLOAD if settings.offload else {})}
        mols = None if section is None else self._with_report_folder(section)
        config_keys: dict[str, Any] = {"gradient_clipping": settings.clip}
        if settings.precision == "fp16":
            power = {"initial_scale_power": FP16_POWER, "loss_scale_window": FP16_WINDOW, "hysteresis": 1}
            config_keys["fp16"] = {"enabled": True, **power}
        ds_config = config(
            settings.stage, mols, precision=settings.precision, zero=zero, micros=settings.micros, **config_keys
        )
        self.engine: Any = mols_ds.initialize(model=self.model, optimizer=optimizer, config=ds_config, **more)[0]
        self.expected_micro_steps = self.engine.micro_steps

    @property
    def mols(self) -> Any:
        """The handle of MoLS; None without MoLS."""
        return getattr(self.engine, "mols", None)

    # ------------------------------------------------------------------ actions

    def apply(self, action: Action) -> list[float]:
        """Perform an action. Returns the loss of `Evaluate`, else an empty list."""
        match action:
            case Step():
                self._step(action)
            case Evaluate():
                return self._evaluate()
            case Freeze(name, frozen):
                self.engine.module.get_parameter(name).requires_grad_(not frozen)
            case Save(tag):
                self.engine.save_checkpoint(str(self.folder), tag)
            case Load():
                self._load(action)
            case Detach():
                self.engine.mols.detach()
            case Attach(section):
                mols_ds.attach(self.engine, self._with_report_folder(section))
            case EditRate(factor):
                for group in self.engine.optimizer.param_groups:
                    group["lr"] *= factor
            case BreakOptimizer(rank):
                if rank == self.rank:
                    step_first_group_only(inner_optimizer(self.engine))
        return []

    def _step(self, step: Step) -> None:
        unused = step.unused if step.on is None or self.rank in step.on else ()
        muted = step.on is not None and self.settings.stage > 0
        options = {"muted": unused} if muted else {"unused": unused}
        discards = self.mols is not None and self.mols.phase == "calibrating" and self.mols.config.mode == "probe"
        for micro in range(self.settings.micros):
            loss = self.engine(batch(self.seed, self.batches, micro, self.rank), **options)
            self.engine.backward(loss * float("nan") if step.bad == self.rank else loss)
            self.engine.step()
        self.expected_micro_steps += 0 if discards else self.settings.micros
        self.batches += 1

    def _evaluate(self) -> list[float]:
        self.engine.eval()
        with torch.no_grad():
            loss = self.engine(batch(self.seed, 0, 0, self.rank))
        self.engine.train()
        return [float(loss)]

    def _load(self, load: Load) -> None:
        if load.fresh:
            self.engine.destroy()
            self._build(load.section)
        micros = self.engine.micro_steps
        self.engine.load_checkpoint(str(self.folder), load.tag)
        self.expected_micro_steps += self.engine.micro_steps - micros
        self._reseed()

    # ------------------------------------------------------------------ snapshot

    def snapshot(self, messages: list[str], eval_losses: list[float], error: str, updated: bool) -> Snapshot:
        """The state of this rank. Only rank 0 has the weights, whole."""
        engine = self.engine
        master_weights = self._master_weights()
        scaler = getattr(engine.optimizer, "loss_scale_config", None)
        scale = scaler.cur_scale if scaler is not None else getattr(engine.optimizer, "loss_scale", 1.0)
        result = Snapshot(
            engine.global_steps, engine.skipped_steps, [float(g["lr"]) for g in engine.optimizer.param_groups],
            float(scale), [digest(torch.get_rng_state())],
            [{name: buffer.detach().clone() for name, buffer in engine.module.named_buffers()}],
            master_weights if self.rank == 0 else {}, warnings=[messages], eval_losses=eval_losses, error=error,
            extra_micro_steps=engine.micro_steps - self.expected_micro_steps,
        )  # fmt: skip
        mols = self.mols
        if mols is not None and mols.phase != "disabled":
            result.phase, result.samples, result.alphas = mols.phase, mols.samples, mols.alphas
            result.rates = dict(mols.multipliers) if updated else {}
        return result

    def _master_weights(self) -> dict[str, Tensor]:
        """fp32 weights, whole, on every rank."""
        engine, outer = self.engine, self.engine.optimizer
        if hasattr(outer, "fp32_groups"):
            groups = zip(outer.fp16_groups, outer.fp32_groups, strict=True)
            masters = {id(p): master for low, high in groups for p, master in zip(low, high, strict=True)}
            return {name: masters[id(p)].detach().clone() for name, p in engine.module.named_parameters()}
        if self.settings.stage == 0 or self.settings.precision == "fp32":
            return full_weights(engine)
        frozen = [p for p in engine.module.parameters() if not p.requires_grad]
        for parameter in frozen:  # DeepSpeed returns none for a frozen parameter
            parameter.requires_grad_(True)
        masters = {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}
        for parameter in frozen:
            parameter.requires_grad_(False)
        return masters


def run_scenario(scenario: Scenario) -> list[Snapshot]:
    """Snapshots of this rank at the start and after each action. A `MolsError` ends the scenario."""
    folder = Path("checkpoints")
    if dist.get_rank() == 0 and folder.exists():
        shutil.rmtree(folder)
    dist.barrier()
    runs: list[DeepSpeedRun] = []
    snapshots = [_snapshot_after(lambda: runs.append(DeepSpeedRun(scenario, folder.resolve())), runs)]
    for action in scenario.actions:
        snapshots.append(_snapshot_after(lambda action=action: runs[0].apply(action), runs, action))
        if snapshots[-1].error:
            break
    runs[0].engine.destroy()
    return snapshots


def _snapshot_after(do: Callable[[], Any], runs: list[DeepSpeedRun], action: Action | None = None) -> Snapshot:
    error, eval_losses = "", []
    before = runs[0].engine.global_steps - runs[0].engine.skipped_steps if runs else 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            eval_losses = do() or []
        except MolsError as raised:
            if not runs:
                raise
            error = f"{type(raised).__name__}: {raised}"
    messages = [str(one.message) for one in caught if issubclass(one.category, MolsWarning)]
    messages = [line for line in messages if NO_PLOT not in line]
    run = runs[0]
    updated = isinstance(action, Step) and run.engine.global_steps - run.engine.skipped_steps > before
    return run.snapshot(messages, eval_losses, error, updated)
