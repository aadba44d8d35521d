"""A life on a real DeepSpeed engine, on one rank of several; what is seen after each action."""

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
from tests.engines.deepspeed.state import full_weights, inner_optimizer
from tests.helpers.digests import digest
from tests.lives.actions import (
    Action,
    Attach,
    BreakOptimizer,
    Detach,
    EditRate,
    Evaluate,
    Freeze,
    Life,
    Load,
    Save,
    Section,
    Setting,
    Step,
)
from tests.lives.model import batch, random_state, tiny
from tests.lives.optimizer import FP16_POWER, FP16_WINDOW
from tests.lives.seen import Seen
from tests.lives.twin import VECTOR_FACTOR, schedule
from tests.lives.users_optimizers import optimizer_of

SIZES = {"sub_group_size": 700, "stage3_param_persistence_threshold": 20}  # elements; several sub-groups
NO_PLOT = "mols_report.png was not drawn"  # ranks of tests have no matplotlib


def groups_of(model: nn.Module, setting: Setting) -> list[dict[str, Any]]:
    """The user's parameter groups."""
    params = list(model.parameters())
    if not setting.split:
        return [{"params": params, "lr": setting.lr, "weight_decay": setting.decay}]
    matrices, vectors = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
    return [
        {"params": matrices, "lr": setting.lr, "weight_decay": setting.decay},
        {"params": vectors, "lr": setting.lr * VECTOR_FACTOR, "weight_decay": 0.0},
    ]


class Run:
    """The user's program of one rank."""

    def __init__(self, life: Life, folder: Path) -> None:
        self.seed, self.setting, self.folder = life.seed, life.setting, folder
        self.rank = dist.get_rank()
        self.batches = self.starts = self.reports = 0
        self.broken = False
        self._reseed()
        self._build(self.setting.section)

    def _own_report(self, section: Section) -> Section:
        """Two engines of one process that write to one folder are warned of."""
        self.reports += 1
        return {**section, "report_dir": f"report{self.seed}.{self.reports}"}

    def _reseed(self) -> None:
        self.starts += 1
        torch.manual_seed(random_state(self.seed, self.starts, self.rank))

    def _build(self, section: Section | None) -> None:
        setting = self.setting
        self.model = tiny(self.seed)
        for name in setting.frozen:
            self.model.get_parameter(name).requires_grad_(False)
        optimizer = optimizer_of(setting, groups_of(self.model, setting))
        more: dict[str, Any] = {}
        if setting.scheduled:
            more["lr_scheduler"] = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        zero = {**(SIZES if setting.stage == 3 else {}), **(OFFLOAD if setting.offload else {})}
        mols = None if section is None else self._own_report(section)
        more_settings: dict[str, Any] = {"gradient_clipping": setting.clip}
        if setting.precision == "fp16":
            power = {"initial_scale_power": FP16_POWER, "loss_scale_window": FP16_WINDOW, "hysteresis": 1}
            more_settings["fp16"] = {"enabled": True, **power}
        settings = config(
            setting.stage, mols, precision=setting.precision, zero=zero, micros=setting.micros, **more_settings
        )
        self.engine: Any = mols_ds.initialize(model=self.model, optimizer=optimizer, config=settings, **more)[0]
        self.expected_micros = self.engine.micro_steps

    @property
    def mols(self) -> Any:
        """The handle; None where there is none."""
        return getattr(self.engine, "mols", None)

    # ------------------------------------------------------------------ actions

    def play(self, action: Action) -> list[float]:
        """Do it; returns the loss of `Evaluate`."""
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
                mols_ds.attach(self.engine, self._own_report(section))
            case EditRate(factor):
                for group in self.engine.optimizer.param_groups:
                    group["lr"] *= factor
            case BreakOptimizer(rank):
                if rank == self.rank:
                    self._break()
        return []

    def _step(self, step: Step) -> None:
        left_out = step.unused if step.on is None or self.rank in step.on else ()
        muted = step.on is not None and self.setting.stage > 0
        options = {"muted": left_out} if muted else {"unused": left_out}
        discards = self.mols is not None and self.mols.phase == "calibrating" and self.mols.config.mode == "probe"
        for micro in range(self.setting.micros):
            loss = self.engine(batch(self.seed, self.batches, micro, self.rank), **options)
            self.engine.backward(loss * float("nan") if step.bad == self.rank else loss)
            self.engine.step()
        self.expected_micros += 0 if discards else self.setting.micros
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
        self.expected_micros += self.engine.micro_steps - micros
        self._reseed()

    def _break(self) -> None:
        """The optimizer keeps a list of its own: it steps the first of the groups that it sees."""
        inner: Any = inner_optimizer(self.engine)
        stock = type(inner).step

        def first_group_only(optimizer: Any, closure: Any = None) -> Any:
            groups = optimizer.param_groups
            optimizer.param_groups = groups[:1]
            try:
                return stock.__wrapped__(optimizer, closure)
            finally:
                optimizer.param_groups = groups

        inner.step = torch.optim.Optimizer.profile_hook_step(first_group_only).__get__(inner)

    # ------------------------------------------------------------------ what is seen

    def look(self, said: list[str], evaluated: list[float], error: str, updated: bool) -> Seen:
        """This rank's view; weights are whole, on rank 0 alone."""
        engine = self.engine
        masters = self._masters()
        scaler = getattr(engine.optimizer, "loss_scale_config", None)
        scale = scaler.cur_scale if scaler is not None else getattr(engine.optimizer, "loss_scale", 1.0)
        seen = Seen(
            engine.global_steps, engine.skipped_steps, [float(g["lr"]) for g in engine.optimizer.param_groups],
            float(scale), [digest(torch.get_rng_state())],
            [{name: buffer.detach().clone() for name, buffer in engine.module.named_buffers()}],
            masters if self.rank == 0 else {}, said=[said], evaluated=evaluated, error=error,
            extra_micros=engine.micro_steps - self.expected_micros,
        )  # fmt: skip
        mols = self.mols
        if mols is not None and mols.phase != "disabled":
            seen.phase, seen.samples, seen.alphas = mols.phase, mols.samples, mols.alphas
            seen.rates = dict(mols.multipliers) if updated else {}
        return seen

    def _masters(self) -> dict[str, Tensor]:
        """Whole fp32 weights, on every rank."""
        engine, outer = self.engine, self.engine.optimizer
        if hasattr(outer, "fp32_groups"):
            groups = zip(outer.fp16_groups, outer.fp32_groups, strict=True)
            masters = {id(p): master for low, high in groups for p, master in zip(low, high, strict=True)}
            return {name: masters[id(p)].detach().clone() for name, p in engine.module.named_parameters()}
        if self.setting.stage == 0 or self.setting.precision == "fp32":
            return full_weights(engine)
        frozen = [p for p in engine.module.parameters() if not p.requires_grad]
        for parameter in frozen:  # DeepSpeed shows no frozen one
            parameter.requires_grad_(True)
        masters = {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}
        for parameter in frozen:
            parameter.requires_grad_(False)
        return masters


def live(life: Life) -> list[Seen]:
    """What this rank sees at the start of the life and after each action; the life ends with a `MolsError`."""
    folder = Path("checkpoints")
    if dist.get_rank() == 0 and folder.exists():
        shutil.rmtree(folder)
    dist.barrier()
    runs: list[Run] = []
    seen = [_watched(lambda: runs.append(Run(life, folder.resolve())), runs)]
    for action in life.actions:
        seen.append(_watched(lambda action=action: runs[0].play(action), runs, action))
        if seen[-1].error:
            break
    runs[0].engine.destroy()
    return seen


def _watched(do: Callable[[], Any], runs: list[Run], action: Action | None = None) -> Seen:
    error, evaluated = "", []
    before = runs[0].engine.global_steps - runs[0].engine.skipped_steps if runs else 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            evaluated = do() or []
        except MolsError as failed:
            if not runs:
                raise
            error = f"{type(failed).__name__}: {failed}"
    said = [str(one.message) for one in caught if issubclass(one.category, MolsWarning)]
    said = [line for line in said if NO_PLOT not in line]
    run = runs[0]
    updated = isinstance(action, Step) and run.engine.global_steps - run.engine.skipped_steps > before
    return run.look(said, evaluated, error, updated)
