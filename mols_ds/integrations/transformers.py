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
from mols_ds.core.protocols import window_of_extra_batches
from mols_ds.core.session import Session
from mols_ds.engines.deepspeed.patching import patched_with
from mols_ds.errors import MolsError, MolsUnsupportedError
from mols_ds.integrations.accelerate import attach_optimizer
from mols_ds.integrations.client import (
    fill_section,
    load_state,
    log_values,
    preserved_attributes,
    preserved_loader,
    preserved_rng_state,
    resolve_section,
    save_state,
)

WHO = "MolsCallback"
FIRST_EPOCH = 1_000_003  # of the extra batches: an order that no training epoch has


class MolsCallback(TrainerCallback):  # type: ignore[misc]
    """MoLS on a Trainer's DeepSpeed engine, or on its torch optimizer without DeepSpeed.

    Unless given, `total_steps` is the Trainer's `max_steps`, and `"ramp_end": "auto"` its warm-up. The Trainer's logs
    get the keys of `mols_ds.integrations.client.log_values`.
    """

    def __init__(self, section: Mapping[str, Any] | None = None) -> None:
        """section: a "mols" section; None: that of the DeepSpeed config."""
        self.section = section
        self.trainer: Any = None
        self._without_deepspeed = Handle()

    def bind(self, trainer: Any) -> MolsCallback:
        """Bind this callback to a trainer, and add it to the trainer. Call it before `trainer.train()`.

        Args:
            trainer: a transformers Trainer, or a subclass such as TRL's.

        Returns:
            This callback.

        Raises:
            MolsUnsupportedError: the Trainer uses nn.DataParallel.
            MolsConfigError: no "mols" section, or two different ones.
            MolsError: this callback is bound to another trainer.
        """
        if self.trainer is trainer:
            return self
        if self.trainer is not None:
            raise MolsError(f"this {WHO} is bound to another trainer: each needs its own")
        if not trainer.is_deepspeed_enabled and trainer.args.n_gpu > 1:
            raise MolsUnsupportedError(
                f"{WHO}: this Trainer uses nn.DataParallel on {trainer.args.n_gpu} GPUs; start one process a GPU "
                "(torchrun), or set CUDA_VISIBLE_DEVICES to one"
            )
        plugin = trainer.accelerator.deepspeed_plugin if trainer.is_deepspeed_enabled else None
        resolve_section(self.section, plugin and plugin.deepspeed_config, WHO)
        self.trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._wrap_log()
        if plugin is None:
            self._wrap_training()
            return self
        self._wrap_prepare()
        create = trainer.create_accelerator_and_postprocess

        def create_accelerator() -> None:
            create()
            self._wrap_prepare()

        trainer.create_accelerator_and_postprocess = create_accelerator  # a search makes an accelerator per trial
        return self

    @property
    def mols(self) -> Handle:
        """The handle of the Trainer's engine or optimizer; one with MoLS off before there is one."""
        found = getattr(getattr(self.trainer, "model_wrapped", None), "mols", None)
        return found if isinstance(found, Handle) else self._without_deepspeed

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

    def _wrap_training(self) -> None:
        """Without DeepSpeed: attach after the Trainer has prepared model and optimizer and before it loads a
        checkpoint, which it does in one method; its scheduler is created between them."""
        trainer = self.trainer
        prepare, create = trainer._prepare_for_training, trainer.create_scheduler
        load, save = trainer._load_optimizer_and_scheduler, trainer._save_optimizer_and_scheduler

        def create_scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
            found = create(num_training_steps, optimizer)
            self._attach(num_training_steps)
            return found

        def prepare_for_training(*args: Any, **kwargs: Any) -> Any:
            trainer.create_scheduler = create_scheduler
            try:
                return prepare(*args, **kwargs)
            finally:
                trainer.create_scheduler = create

        def load_optimizer_and_scheduler(checkpoint: Any) -> None:
            load(checkpoint)
            if checkpoint is not None:
                load_state(self._without_deepspeed, checkpoint)

        def save_optimizer_and_scheduler(output_dir: Any) -> None:
            save(output_dir)
            save_state(self._without_deepspeed, output_dir)

        trainer._prepare_for_training = prepare_for_training
        trainer._load_optimizer_and_scheduler = load_optimizer_and_scheduler
        trainer._save_optimizer_and_scheduler = save_optimizer_and_scheduler

    def _attach(self, steps: int) -> None:
        trainer, accelerator = self.trainer, self.trainer.accelerator
        if getattr(trainer.optimizer.optimizer, "mols", None) is self._without_deepspeed:
            return  # a second train() goes on with the optimizer
        section = fill_section(resolve_section(self.section, None, WHO), steps, trainer.args.get_warmup_steps(steps))
        model = accelerator._models[-1] if accelerator._models else trainer.model
        self._without_deepspeed = attach_optimizer(
            accelerator, model, trainer.optimizer, section, window_of_extra_batches
        )

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
            raise MolsError(f"{WHO} has no trainer: call callback.bind(trainer) before trainer.train()")
        if type(self.mols) is Handle:
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
            self._measure_update(samples, items)

    def _measure_update(self, samples: list[Any], items: Any) -> None:
        """Run the micro-batches of one update, and the optimizer's step, which measures."""
        trainer, accelerator, model = self.trainer, self.trainer.accelerator, self.trainer.model_wrapped
        deepspeed = trainer.is_deepspeed_enabled  # its engine steps in the last backward pass
        for number, batch in enumerate(samples, 1):
            last = number == len(samples)
            accelerator.gradient_state._set_sync_gradients(last)
            with contextlib.nullcontext() if deepspeed or last else accelerator.no_sync(model=model):
                trainer.training_step(model, batch, items)
        if not deepspeed:
            trainer.optimizer.step()
            model.zero_grad()


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
