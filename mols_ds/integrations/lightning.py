"""MoLS in Lightning's Trainer with DeepSpeedStrategy.

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
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import CombinedLoader

from mols_ds.core.handle import Handle
from mols_ds.core.session import Session
from mols_ds.engines.deepspeed.patching import patched_with
from mols_ds.errors import MolsError, MolsUnsupportedError
from mols_ds.integrations.client import (
    fill_section,
    log_values,
    preserved_loader,
    preserved_rng_state,
    resolve_section,
)

WHO = "MolsCallback"
FIRST_EPOCH = 1_000_003  # of the extra batches: an order that no training epoch has


class MolsCallback(pl.Callback):  # type: ignore[misc]
    """MoLS on the engine of Lightning's DeepSpeedStrategy.

    Unless given, `total_steps` is `trainer.estimated_stepping_batches`. The module's logs get the keys of
    `mols_ds.integrations.client.log_values`.
    """

    def __init__(self, section: Mapping[str, Any] | None = None) -> None:
        """section: a "mols" section; None: that of the strategy's DeepSpeed config."""
        super().__init__()
        self.section = section
        self.mols = Handle()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Make the strategy build its engine with MoLS. Lightning loads a checkpoint after that."""
        if stage != "fit":
            return
        strategy = trainer.strategy
        if not isinstance(strategy, DeepSpeedStrategy):
            raise MolsUnsupportedError(
                f"{WHO}: the strategy is {type(strategy).__name__}; use Trainer(strategy=DeepSpeedStrategy(...))"
            )
        section = resolve_section(self.section, strategy.config, WHO)
        build = strategy._setup_model_and_optimizer

        def build_with_mols(*args: Any, **kwargs: Any) -> Any:
            steps = trainer.estimated_stepping_batches
            filled = fill_section(section, int(steps) if steps not in (-1, float("inf")) else None)
            with patched_with(filled):
                return build(*args, **kwargs)

        strategy._setup_model_and_optimizer = build_with_mols

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Raise if the engine has no MoLS."""
        found = getattr(trainer.strategy.model, "mols", None)
        if not isinstance(found, Handle):
            raise MolsError(f"{WHO}: the strategy built its engine in its own way, without MoLS")
        self.mols = found

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Restore the strategy's own method."""
        vars(trainer.strategy).pop("_setup_model_and_optimizer", None)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure all samples on extra batches when the calibration is due (mode "probe")."""
        mols, engine = self.mols, trainer.strategy.model
        if not isinstance(mols, Session) or not mols.controller.discards_steps:
            return
        if engine.micro_steps % engine.gradient_accumulation_steps():
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
        mols, engine = self.mols, trainer.strategy.model
        assert isinstance(mols, Session)
        batches: Iterator[Any] = iter(loader)
        fresh = True
        while mols.controller.discards_steps:
            try:
                batch, _, loader_idx = next(batches)
            except StopIteration:
                if fresh:
                    raise MolsError(
                        f'{WHO}: the training data gave no batch to measure; use "mode": "online"'
                    ) from None
                batches, fresh = iter(loader), True
                continue
            fresh = False
            batch = trainer.precision_plugin.convert_input(batch)
            batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=loader_idx)
            batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=loader_idx)
            kwargs = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx)
            output = call._call_strategy_hook(trainer, "training_step", *kwargs.values())
            loss = output["loss"] if isinstance(output, Mapping) else output
            engine.backward(loss / trainer.accumulate_grad_batches)
            engine.step()


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
