"""Runs a scenario on one rank of a real Megatron-core model and optimizer; a snapshot after each action."""

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
from tests.scenarios.megatron_reference import FIRST_SCALE, WARMUP, setup_of
from tests.scenarios.model import random_state
from tests.scenarios.reference_optimizer import BETAS, EPS, FP16_WINDOW
from tests.scenarios.scenario import Action, Attach, Detach, EditRate, Freeze, Load, Save, Scenario, Section, Step
from tests.scenarios.snapshot import Snapshot

NO_PLOT = "mols_report.png was not drawn"  # ranks of tests have no matplotlib


class MegatronRun:
    """The training program of one rank."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.seed, self.settings, self.folder = scenario.seed, scenario.settings, folder
        self.setup = setup_of(scenario.settings)
        self.rank = dist.get_rank()
        self.batches = self.seedings = self.reports = self.saves = 0
        self.folders: dict[str, str] = {}
        self.unused: tuple[int, ...] = ()
        self.updated = False
        self._build(self.settings.section)
        self._reseed()

    def _reseed(self) -> None:
        self.seedings += 1
        torch.manual_seed(random_state(self.seed, self.seedings, self.rank))

    def _build(self, section: Section | None) -> None:
        settings = self.settings
        building.start(self.setup)
        self.built = building.build(self.setup)
        for chunk in self.built.chunks:
            for module in chunk.modules():
                if hasattr(module, "layer_number") and hasattr(module, "mlp"):
                    self._make_skippable(module.mlp, module.layer_number - 1)
        self.optimizer, self.scheduler = building.optimizer(
            self.built,
            warmup=WARMUP if settings.scheduled else 0,
            init_lr=settings.lr / 2 if settings.scheduled else 0.0,
            style="constant",
            adam_eps=EPS,
            adam_beta1=BETAS[0],
            decoupled_weight_decay=settings.optimizer == "adamw",
            initial_loss_scale=FIRST_SCALE,
            loss_scale_window=FP16_WINDOW,
            hysteresis=1,
        )
        self.mols: Any = None
        if section is not None:
            self._attach(section)

    def _make_skippable(self, mlp: Any, number: int) -> None:
        original = mlp.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (torch.zeros_like(x), None) if number in self.unused else original(x, *args, **kwargs)

        mlp.forward = forward

    def _attach(self, section: Section) -> None:
        self.reports += 1
        own = {**section, "report_dir": f"report{self.seed}.{self.reports}"}
        self.mols = building.attach(self.built, self.optimizer, self.scheduler, own)

    # ------------------------------------------------------------------ actions

    def apply(self, action: Action) -> None:
        """Perform an action."""
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
        if self.updated and self.settings.scheduled:
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
            num_microbatches=self.settings.micros,
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
        if self.settings.scheduled:
            self.scheduler.num_steps = 0  # loading adds to the steps that it has counted
            self.scheduler.load_state_dict(state["opt_param_scheduler"])
        self._reseed()

    def close(self) -> None:
        """Release the optimizer: Megatron's DDP is never garbage-collected, and its config refers to the optimizer."""
        self.built.config.grad_scale_func = None

    # ------------------------------------------------------------------ snapshot

    def snapshot(self, messages: list[str], error: str) -> Snapshot:
        """The state of this rank, with its parts of the weights."""
        mols = self.mols
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        result = Snapshot(
            self.optimizer_steps() if mols is None else mols.steps, 0, sorted(set(rates)),
            float(self.optimizer.get_loss_scale()), [digest(torch.get_rng_state())], [{}], {},
            warnings=[messages], error=error, parts=weights(self.built),
        )  # fmt: skip
        if mols is not None:
            result.phase, result.samples, result.alphas = mols.phase, mols.samples, mols.alphas
            result.rates = dict(mols.multipliers) if self.updated else {}
        return result

    def optimizer_steps(self) -> int:
        """Number of updates that Adam has counted."""
        from megatron_patches.schedule import optimizer_steps

        return optimizer_steps(self.optimizer)


def run_scenario(scenario: Scenario) -> list[Snapshot]:
    """Snapshots of this rank at the start and after each action. A `MolsError` ends the scenario."""
    folder = Path("checkpoints").resolve() / str(scenario.seed)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    with cpu_megatron(fused_adam=scenario.settings.grid["distributed"]):
        runs: list[MegatronRun] = []
        snapshots = [_snapshot_after(lambda: runs.append(MegatronRun(scenario, folder)), runs)]
        for action in scenario.actions:
            snapshots.append(_snapshot_after(lambda action=action: runs[0].apply(action), runs))
            if snapshots[-1].error:
                break
        runs[0].close()
    return snapshots


def _snapshot_after(do: Callable[[], object], runs: list[MegatronRun]) -> Snapshot:
    error = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            do()
        except MolsError as raised:
            if not runs:
                raise
            error = f"{type(raised).__name__}: {raised}"
    messages = [str(one.message) for one in caught if issubclass(one.category, MolsWarning)]
    return runs[0].snapshot([line for line in messages if NO_PLOT not in line], error)
