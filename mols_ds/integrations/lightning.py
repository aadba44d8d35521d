"""MoLS in Lightning's Trainer: DeepSpeedStrategy, DDPStrategy, SingleDeviceStrategy, ModelParallelStrategy.

    trainer = L.Trainer(strategy=DeepSpeedStrategy(...), callbacks=[MolsCallback(SECTION)])
    trainer.fit(module, ckpt_path=...)

In mode "probe", extra batches measure the gradients before the step at which the calibration is due. So updates,
schedule and the order of the training data are those of a run without MoLS.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import CombinedLoader

from mols_ds.core.handle import Handle
from mols_ds.core.protocols import window_of_extra_batches
from mols_ds.core.replaced_methods import ReplacedMethods
from mols_ds.core.session import Session
from mols_ds.engines.deepspeed.patching import patched_with
from mols_ds.engines.torch import api as torch_api
from mols_ds.engines.torch.engine import TorchMols
from mols_ds.engines.torch.off import TorchOff
from mols_ds.engines.torch.window import watch_method
from mols_ds.errors import MolsError, MolsUnsupportedError
from mols_ds.integrations.client import (
    fill_section,
    log_values,
    preserved_loader,
    preserved_rng_state,
    resolve_section,
)

WHO = "MolsCallback"
PLAIN = (DDPStrategy, SingleDeviceStrategy, ModelParallelStrategy)
"""Strategies whose optimizers are torch's own."""
FIRST_EPOCH = 1_000_003  # of the extra batches: an order that no training epoch has


class MolsCallback(pl.Callback):  # type: ignore[misc]
    """MoLS on the engine of Lightning's DeepSpeedStrategy, or on the optimizers of a strategy in `PLAIN`.

    Unless given, `total_steps` is `trainer.estimated_stepping_batches`. The module's logs get the keys of
    `mols_ds.integrations.client.log_values`.
    """

    def __init__(self, section: Mapping[str, Any] | None = None) -> None:
        """section: a "mols" section; None: that of the strategy's DeepSpeed config."""
        super().__init__()
        self.section = section
        self.mols = Handle()
        self._replaced: list[ReplacedMethods] = []
        self._loaded: Mapping[str, Any] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Make the strategy build its engine with MoLS. Lightning loads a checkpoint after that."""
        if stage != "fit":
            return
        strategy, self._loaded = trainer.strategy, None
        if _is_plain(strategy):
            resolve_section(self.section, None, WHO)
            return
        if not isinstance(strategy, DeepSpeedStrategy):
            names = ", ".join(kind.__name__ for kind in (DeepSpeedStrategy, *PLAIN))
            raise MolsUnsupportedError(
                f"{WHO}: the strategy is {type(strategy).__name__}; Trainer(strategy=...) must be one of {names}"
            )
        section = resolve_section(self.section, strategy.config, WHO)

        def build_with_mols(*args: Any, **kwargs: Any) -> Any:
            with patched_with(fill_section(section, _total_steps(trainer))):
                return build(*args, **kwargs)

        self._replaced.append(ReplacedMethods(strategy))
        build = self._replaced[-1].set("_setup_model_and_optimizer", build_with_mols)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimizers of a strategy in `PLAIN`. Lightning loads their states after that."""
        strategy = trainer.strategy
        if not _is_plain(strategy):
            return
        section = fill_section(resolve_section(self.section, None, WHO), _total_steps(trainer))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.mols = mols = torch_api.attach(
            trainer.optimizers, strategy.model, section, None, scaler, window_of_extra_batches
        )
        if isinstance(mols, TorchMols) and strategy.model is pl_module:  # then Lightning does not call the model
            self._replaced.append(watch_method(mols, pl_module, "training_step"))
        self._follow_checkpoints(strategy)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Continue from the loaded checkpoint; raise if the engine has no MoLS."""
        if not _is_plain(trainer.strategy):
            found = getattr(trainer.strategy.model, "mols", None)
            if not isinstance(found, Handle):
                raise MolsError(f"{WHO}: the strategy built its engine in its own way, without MoLS")
            self.mols = found
        elif self._loaded is not None:
            own = _own_file(trainer.ckpt_path, trainer.global_rank)
            files = TorchCheckpointIO()
            try:
                state = self._loaded if trainer.is_global_zero else files.load_checkpoint(own)
            except FileNotFoundError:  # no calibration was in progress, or there were fewer ranks
                state = self._loaded
            self.mols.load_state_dict(state)
        elif trainer.ckpt_path is not None and isinstance(self.mols, TorchMols):
            self.mols.resume_stock()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Read the gradients, which Lightning clips next."""
        self.mols.read_gradients()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Restore what was replaced, and detach from the optimizers of a strategy in `PLAIN`."""
        for methods in self._replaced:
            methods.undo()
        self._replaced = []
        if isinstance(self.mols, TorchMols):
            self.mols.detach()

    # ------------------------------------------------------------------ checkpoints of a strategy in PLAIN

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state; Lightning saves rank 0's."""
        return self.mols.state_dict() if isinstance(self.mols, TorchMols | TorchOff) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the optimizers are loaded."""
        self._loaded = state_dict

    def _follow_checkpoints(self, strategy: Any) -> None:
        """Inside of a calibration the other ranks save their states beside the checkpoint."""
        files = TorchCheckpointIO()

        def save(checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
            stock_save(checkpoint, filepath, storage_options=storage_options)
            own = _own_file(filepath, strategy.global_rank)
            if not strategy.is_global_zero and isinstance(self.mols, TorchMols) and self.mols.controller.measuring:
                files.save_checkpoint(self.mols.state_dict(), own)
            elif not strategy.is_global_zero:
                files.remove_checkpoint(own)  # of a checkpoint that this one overwrites

        def remove(filepath: Any) -> None:
            stock_remove(filepath)
            if not strategy.is_global_zero:
                files.remove_checkpoint(_own_file(filepath, strategy.global_rank))

        self._replaced.append(ReplacedMethods(strategy))
        stock_save = self._replaced[-1].set("save_checkpoint", save)
        stock_remove = self._replaced[-1].set("remove_checkpoint", remove)

    # ------------------------------------------------------------------ batches

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure all samples on extra batches when the calibration is due (mode "probe")."""
        mols, engine = self.mols, trainer.strategy.model
        if not isinstance(mols, Session) or not mols.controller.discards_steps:
            return
        if _is_plain(trainer.strategy):
            inside = batch_idx % trainer.accumulate_grad_batches
        else:
            inside = engine.micro_steps % engine.gradient_accumulation_steps()
        if inside:
            return
        if not pl_module.automatic_optimization:
            raise MolsUnsupportedError(
                f'{WHO}: mode "probe" measures extra batches and does not support manual optimization; '
                'use "mode": "online"'
            )
        with preserved_rng_state(), _muted_logs(pl_module), _separate_loader(trainer) as loader:
            self._measure(trainer, loader, batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the last step's multipliers and rates, and the calibration."""
        values = log_values(self.mols)
        if values:
            pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def _measure(self, trainer: Any, loader: CombinedLoader, batch_idx: int) -> None:
        mols, strategy, wanted = self.mols, trainer.strategy, trainer.accumulate_grad_batches
        assert isinstance(mols, Session)
        batches = _endless(loader)
        while mols.controller.discards_steps:
            if not _is_plain(strategy):
                strategy.model.backward(_loss(trainer, *next(batches), batch_idx) / wanted)
                strategy.model.step()
                continue
            (optimizer,) = trainer.optimizers
            optimizer.zero_grad()
            for micro in range(wanted):
                with _block_parallel_sync_behavior(strategy, block=micro < wanted - 1):
                    strategy.backward(_loss(trainer, *next(batches), batch_idx) / wanted, optimizer)
            if (scaler := getattr(trainer.precision_plugin, "scaler", None)) is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()


def _is_plain(strategy: Any) -> bool:
    return isinstance(strategy, PLAIN) and not isinstance(strategy, DeepSpeedStrategy)  # which is a DDPStrategy


def _total_steps(trainer: Any) -> int | None:
    steps = trainer.estimated_stepping_batches
    return int(steps) if steps not in (-1, float("inf")) else None


def _own_file(checkpoint: Any, rank: int) -> str:
    """File of a rank's state, beside a checkpoint."""
    return f"{str(checkpoint).rstrip('/')}.mols_{rank}"


def _endless(loader: CombinedLoader) -> Iterator[tuple[Any, int]]:
    """Yield (batch, number of its loader), from the beginning again at the end."""
    while True:
        given = False
        for batch, _, loader_idx in loader:
            given = True
            yield batch, loader_idx
        if not given:
            raise MolsError(f'{WHO}: the training data gave no batch to measure; use "mode": "online"')


def _loss(trainer: Any, batch: Any, loader_idx: int, batch_idx: int) -> Any:
    """Run the module's `training_step` on a batch."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=loader_idx)
    batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=loader_idx)
    kwargs = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx)
    output = call._call_strategy_hook(trainer, "training_step", *kwargs.values())
    return output["loss"] if isinstance(output, Mapping) else output


@contextlib.contextmanager
def _muted_logs(pl_module: Any) -> Iterator[None]:
    """Drop what `training_step` logs for an extra batch."""
    own = vars(pl_module).get("log")
    pl_module.log = lambda *args, **kwargs: None
    try:
        yield
    finally:
        if own is None:
            del pl_module.log
        else:
            pl_module.log = own


@contextlib.contextmanager
def _separate_loader(trainer: Any) -> Iterator[CombinedLoader]:
    """Yield the training data in another order. Restores loaders, samplers and their generators afterwards."""
    combined = CombinedLoader(trainer.train_dataloader, trainer.fit_loop._combined_loader._mode)
    for loader in combined.flattened:
        if getattr(loader, "persistent_workers", False):
            raise MolsUnsupportedError(
                f'{WHO}: mode "probe" reads extra batches from the training loader, which persistent_workers=True does '
                'not allow: set it to False, or use "mode": "online"'
            )
    with contextlib.ExitStack() as stack:
        for loader in combined.flattened:
            stack.enter_context(preserved_loader(loader))
            _set_sampler_epoch(loader, FIRST_EPOCH + int(trainer.global_step))
        yield combined
