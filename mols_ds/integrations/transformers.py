"""MoLS in transformers' Trainer and its subclasses in TRL: SFTTrainer, DPOTrainer.

    trainer = Trainer(...)
    MolsCallback().bind(trainer)
    trainer.train()

In mode "probe", extra batches measure the gradients before the step at which the calibration is due. So the Trainer's
updates, schedule, order of the training data, evaluations and checkpoints are those of a run without MoLS.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from mols_ds.core.handle import Handle
from mols_ds.core.session import Session
from mols_ds.engines.deepspeed.patching import patched_with
from mols_ds.errors import MolsError, MolsUnsupportedError
from mols_ds.integrations.client import (
    fill_section,
    log_values,
    preserved_attributes,
    preserved_loader,
    preserved_rng_state,
    resolve_section,
)

WHO = "MolsCallback"
FIRST_EPOCH = 1_000_003  # of the extra batches: an order that no training epoch has


class MolsCallback(TrainerCallback):  # type: ignore[misc]
    """MoLS on a Trainer's DeepSpeed engine.

    Unless given, `total_steps` is the Trainer's `max_steps`, and `"ramp_end": "auto"` its warm-up. The Trainer's logs
    get the keys of `mols_ds.integrations.client.log_values`.
    """

    def __init__(self, section: Mapping[str, Any] | None = None) -> None:
        """section: a "mols" section; None: that of the DeepSpeed config."""
        self.section = section
        self.trainer: Any = None

    def bind(self, trainer: Any) -> MolsCallback:
        """Bind this callback to a trainer, and add it to the trainer. Call it before `trainer.train()`.

        Returns:
            This callback.

        Raises:
            MolsUnsupportedError: the Trainer does not use DeepSpeed.
            MolsConfigError: no "mols" section, or two different ones.
            MolsError: this callback is bound to another trainer.
        """
        if self.trainer is trainer:
            return self
        if self.trainer is not None:
            raise MolsError(f"this {WHO} is bound to another trainer: each needs its own")
        if not trainer.is_deepspeed_enabled:
            raise MolsUnsupportedError(
                f"{WHO}: this Trainer does not use DeepSpeed; give TrainingArguments(deepspeed=CONFIG)"
            )
        resolve_section(self.section, trainer.accelerator.deepspeed_plugin.deepspeed_config, WHO)
        self.trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._wrap_log()
        self._wrap_prepare()
        create = trainer.create_accelerator_and_postprocess

        def create_accelerator() -> None:
            create()
            self._wrap_prepare()

        trainer.create_accelerator_and_postprocess = create_accelerator  # a search makes an accelerator per trial
        return self

    @property
    def mols(self) -> Handle:
        """`engine.mols` of the Trainer's engine; a handle with MoLS off before there is one."""
        found = getattr(getattr(self.trainer, "model_wrapped", None), "mols", None)
        return found if isinstance(found, Handle) else Handle()

    # ------------------------------------------------------------------ wrappers of the Trainer's methods

    def _wrap_prepare(self) -> None:
        """Make accelerate build the training engine with MoLS. The Trainer loads a checkpoint after that."""
        accelerator = self.trainer.accelerator
        prepare = accelerator._prepare_deepspeed

        def prepare_deepspeed(*args: Any) -> Any:
            config = accelerator.deepspeed_plugin.deepspeed_config
            section = resolve_section(self.section, config, WHO)
            with _without_key(config, "mols"):  # accelerate refuses every "auto" that it cannot fill
                if not any(_is_optimizer(argument) for argument in args):
                    return prepare(*args)
                steps = self.trainer.state.max_steps
                with patched_with(fill_section(section, steps, self.trainer.args.get_warmup_steps(steps))):
                    return prepare(*args)

        accelerator._prepare_deepspeed = prepare_deepspeed

    def _wrap_log(self) -> None:
        """Add our keys in `trainer.log`. In `on_log` they would miss the history and earlier callbacks."""
        log = self.trainer.log

        def log_with_mols(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            log({**logs, **log_values(self.mols)} if "loss" in logs else logs, *args, **kwargs)

        self.trainer.log = log_with_mols

    # ------------------------------------------------------------------ callbacks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise if the engine has no MoLS."""
        if self.trainer is None:
            raise MolsError(f"{WHO} does not know its trainer: call callback.bind(trainer) before trainer.train()")
        if not isinstance(getattr(self.trainer.model_wrapped, "mols", None), Handle):
            raise MolsError(
                f"{WHO}: the Trainer's model ({type(self.trainer.model_wrapped).__name__}) has no MoLS: its engine was "
                "built before bind(trainer) was called, or by a subclass of Trainer in its own way"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure all samples on extra batches when the calibration is due (mode "probe")."""
        if isinstance(self.mols, Session) and self.mols.controller.discards_steps:
            with preserved_rng_state(), preserved_attributes(self.trainer), self._extra_batches() as loader:
                self._measure(loader)

    @contextlib.contextmanager
    def _extra_batches(self) -> Iterator[Any]:
        """Yield a separate loader of the training data, which accelerate forgets afterwards."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        state = accelerator.gradient_state
        sync, references, known = state.sync_gradients, state.dataloader_references, list(accelerator._dataloaders)
        loader = trainer.get_train_dataloader()
        if loader is trainer.callback_handler.train_dataloader:
            raise MolsUnsupportedError(
                'get_train_dataloader returns the loader that the Trainer reads, and mode "probe" reads extra batches: '
                'return a new one, or use "mode": "online"'
            )
        try:
            with preserved_loader(loader):  # a sampler of the user's may be shared with the loader that trains
                yield loader
        finally:
            accelerator._dataloaders[:], state.dataloader_references = known, references
            state._set_sync_gradients(sync)

    def _measure(self, loader: Any) -> None:
        trainer, mols = self.trainer, self.mols
        assert isinstance(mols, Session)
        wanted = trainer.args.gradient_accumulation_steps
        epoch = FIRST_EPOCH + int(trainer.state.global_step)
        batches: Iterator[Any] = iter(())
        while mols.controller.discards_steps:
            samples, items = trainer.get_batch_samples(batches, wanted, trainer.args.device)
            if len(samples) < wanted:
                if hasattr(loader, "set_epoch"):
                    loader.set_epoch(epoch)
                batches, epoch = iter(loader), epoch + 1
                samples, items = trainer.get_batch_samples(batches, wanted, trainer.args.device)
            if not samples:
                raise MolsError(f'{WHO}: the training data gave no batch to measure; use "mode": "online"')
            trainer.current_gradient_accumulation_steps = len(samples)
            for number, batch in enumerate(samples, 1):
                trainer.accelerator.gradient_state._set_sync_gradients(number == len(samples))
                trainer.training_step(trainer.model_wrapped, batch, items)


def _is_optimizer(value: object) -> bool:
    return isinstance(value, torch.optim.Optimizer) or type(value).__name__ == "DummyOptim"


@contextlib.contextmanager
def _without_key(config: dict[str, Any], key: str) -> Iterator[None]:
    """Remove a key from `config` within the context."""
    if key not in config:
        yield
        return
    value = config.pop(key)
    try:
        yield
    finally:
        config[key] = value
