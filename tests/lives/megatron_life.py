"""A life on a real Megatron-core model and optimizer, on one rank of several; what is seen after each action."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_patches.cpu.emulation import cpu_megatron
from mols_ds.errors import MolsError, MolsWarning
from tests.engines.megatron import building, checkpoints
from tests.engines.megatron.building import SEQUENCES
from tests.engines.megatron.grids import weights
from tests.engines.megatron.weights import logical_names
from tests.helpers.digests import digest
from tests.lives.actions import Action, Attach, Detach, EditRate, Freeze, Life, Load, Save, Section, Step
from tests.lives.megatron_twin import FIRST_SCALE, WARMUP, setup_of
from tests.lives.model import random_state
from tests.lives.optimizer import BETAS, EPS, FP16_WINDOW
from tests.lives.seen import Seen

NO_PLOT = "mols_report.png was not drawn"  # ranks of tests have no matplotlib


class Run:
    """The user's program of one rank."""

    def __init__(self, life: Life, folder: Path) -> None:
        self.seed, self.setting, self.folder = life.seed, life.setting, folder
        self.setup = setup_of(life.setting)
        self.rank = dist.get_rank()
        self.batches = self.starts = self.reports = self.saves = 0
        self.folders: dict[str, str] = {}
        self.unused: tuple[int, ...] = ()
        self.updated = False
        self._build(self.setting.section)
        self._reseed()

    def _reseed(self) -> None:
        self.starts += 1
        torch.manual_seed(random_state(self.seed, self.starts, self.rank))

    def _build(self, section: Section | None) -> None:
        setting = self.setting
        building.start(self.setup)
        self.built = building.build(self.setup)
        for chunk in self.built.chunks:
            for module in chunk.modules():
                if hasattr(module, "layer_number") and hasattr(module, "mlp"):
                    self._make_skippable(module.mlp, module.layer_number - 1)
        self.optimizer, self.scheduler = building.optimizer(
            self.built,
            warmup=WARMUP if setting.scheduled else 0,
            init_lr=setting.lr / 2 if setting.scheduled else 0.0,
            style="constant",
            adam_eps=EPS,
            adam_beta1=BETAS[0],
            decoupled_weight_decay=setting.optimizer == "adamw",
            initial_loss_scale=FIRST_SCALE,
            loss_scale_window=FP16_WINDOW,
            hysteresis=1,
        )
        self.mols: Any = None
        if section is not None:
            self._attach(section)

    def _make_skippable(self, mlp: Any, number: int) -> None:
        stock = mlp.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (torch.zeros_like(x), None) if number in self.unused else stock(x, *args, **kwargs)

        mlp.forward = forward

    def _attach(self, section: Section) -> None:
        self.reports += 1
        own = {**section, "report_dir": f"report{self.seed}.{self.reports}"}
        self.mols = building.attach(self.built, self.optimizer, self.scheduler, own)

    # ------------------------------------------------------------------ actions

    def play(self, action: Action) -> None:
        """Do it."""
        self.updated = False
        match action:
            case Step():
                self._step(action)
            case Freeze(name, frozen):
                for chunk in self.built.chunks:
                    parameter = logical_names(chunk, self.setup).get(name)
                    if parameter is not None:
                        parameter.requires_grad_(not frozen)
            case Save(tag):
                self.saves += 1
                self.folders[tag] = str(self.folder / f"save{self.saves}")
                checkpoints.save(self.built, self.optimizer, self.scheduler, self.folders[tag], "fully_reshardable")
            case Load():
                self._load(action)
            case Detach():
                self.mols.detach()
                self.mols = None
            case Attach(section):
                self._attach(section)
            case EditRate(factor):
                for group in self.optimizer.param_groups:
                    group["lr"] *= factor

    def _step(self, step: Step) -> None:
        from megatron.core import parallel_state

        replica = parallel_state.get_data_parallel_rank()
        self.unused = step.unused if step.on is None or replica in step.on else ()
        for chunk in self.built.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._forward_backward(step.bad == replica)
        self.updated = bool(self.optimizer.step()[0])
        if self.updated and self.setting.scheduled:
            self.scheduler.step(increment=building.samples_per_step(self.setup))
        self.batches += 1

    def _forward_backward(self, bad: bool) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        setup = self.setup
        positions = torch.arange(setup.seq)[None].expand(SEQUENCES, -1)
        masked = torch.triu(torch.ones(1, 1, setup.seq, setup.seq, dtype=torch.bool), 1)

        def loss_of(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = output.float().mean()
            return loss * float("nan") if bad else loss, {}

        def forward_step(iterator: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
            ids = next(iterator)
            return model(ids, positions, masked, labels=ids.roll(-1, 1)), loss_of

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=building._mine(setup, self.batches),
            model=self.built.chunks,
            num_microbatches=self.setting.micros,
            seq_length=setup.seq,
            micro_batch_size=SEQUENCES,
            forward_only=False,
        )

    def _load(self, load: Load) -> None:
        if load.fresh:
            self.close()
            self._build(load.section)
        folder = self.folders[load.tag]
        if self.mols is not None:
            self.mols.resume_from(folder)
        state = checkpoints.read(self.built, self.optimizer, folder, "fully_reshardable")
        checkpoints._unwrapped(self.built.chunks[0]).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.setting.scheduled:
            self.scheduler.num_steps = 0  # a load adds to what it has counted
            self.scheduler.load_state_dict(state["opt_param_scheduler"])
        self._reseed()

    def close(self) -> None:
        """Megatron's DDP is never collected, and its config would keep the optimizer alive."""
        self.built.config.grad_scale_func = None

    # ------------------------------------------------------------------ what is seen

    def look(self, said: list[str], error: str) -> Seen:
        """This rank's view; weights are this rank's parts."""
        mols = self.mols
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        seen = Seen(
            self.optimizer_steps() if mols is None else mols.steps, 0, sorted(set(rates)),
            float(self.optimizer.get_loss_scale()), [digest(torch.get_rng_state())], [{}], {},
            said=[said], error=error, parts=weights(self.built),
        )  # fmt: skip
        if mols is not None:
            seen.phase, seen.samples, seen.alphas = mols.phase, mols.samples, mols.alphas
            seen.rates = dict(mols.multipliers) if self.updated else {}
        return seen

    def optimizer_steps(self) -> int:
        """Updates by the count of Adam."""
        from megatron_patches.schedule import optimizer_steps

        return optimizer_steps(self.optimizer)


def live(life: Life) -> list[Seen]:
    """What this rank sees at the start of the life and after each action."""
    folder = Path("checkpoints").resolve() / str(life.seed)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    with cpu_megatron(fused_adam=life.setting.grid["distributed"]):
        runs: list[Run] = []
        seen = [_watched(lambda: runs.append(Run(life, folder)), runs)]
        for action in life.actions:
            seen.append(_watched(lambda action=action: runs[0].play(action), runs))
            if seen[-1].error:
                break
        runs[0].close()
    return seen


def _watched(do: Callable[[], object], runs: list[Run]) -> Seen:
    error = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            do()
        except MolsError as failed:
            if not runs:
                raise
            error = f"{type(failed).__name__}: {failed}"
    said = [str(one.message) for one in caught if issubclass(one.category, MolsWarning)]
    return runs[0].look([line for line in said if NO_PLOT not in line], error)
