"""Lightning's Trainer with its real strategies: one run, and what came of it.

A resumed run has the data of the uninterrupted one only where the loader can be resumed (`Resumable`), and without
Lightning's own DistributedSampler, which has the order of the first epoch again (2.6.6, seen without MoLS).

Lightning refuses a CPU there. Three checks are put aside (`OnCpu`), and nothing else: that the accelerator is CUDA's,
that the devices' numbers fit CUDA_VISIBLE_DEVICES, and the device, which must have a number.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard
from transformers import get_linear_schedule_with_warmup

from tests.helpers.harness import pictures_allowed

with pictures_allowed():
    import lightning.pytorch as pl
    import lightning.pytorch.strategies.deepspeed as strategies
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

import mols_ds
from mols_ds.integrations.lightning import MolsCallback
from tests.helpers.digests import digest
from tests.integrations.runs import (
    LR,
    PLAIN,
    SAVED,
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

CLIP: float | None = 1.0  # below most of the gradient norms; without DeepSpeed
PLUGINS: list[Any] | None = None
EPOCH, MICROS, BATCH = 7, 2, 2  # updates of an epoch, batches of an update, sequences of a batch


class OnCpu(DeepSpeedStrategy):  # type: ignore[misc]
    """DeepSpeedStrategy without its checks of the device."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)


strategies._validate_device_index_selection = lambda devices: None


class Resumable(torch.utils.data.DataLoader):  # type: ignore[type-arg]
    """Goes on in the middle of an epoch, which Lightning leaves to the loader. As torchdata's StatefulDataLoader, its
    state is that of the iterator that it made last."""

    _iterator: Any = None
    _begin_at = 0

    def __iter__(self) -> Any:
        self._iterator = Counted(super().__iter__())
        for _ in range(self._begin_at):
            next(self._iterator)
        self._begin_at = 0
        return self._iterator

    def state_dict(self) -> dict[str, int]:
        return {"batches": self._iterator.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._begin_at = state["batches"]


class Counted:
    """An iterator that knows how many batches it gave."""

    def __init__(self, below: Any) -> None:
        self.below, self.batches = below, 0

    def __iter__(self) -> Counted:
        return self

    def __next__(self) -> Any:
        batch = next(self.below)
        self.batches += 1
        return batch


class Module(pl.LightningModule):  # type: ignore[misc]
    """The usual module."""

    def __init__(self) -> None:
        super().__init__()
        self.model = model()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss)
        self.log("epoch loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.model(input_ids=batch, labels=batch).loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=LR)
        plan = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plan, "interval": "step"}}


class Sharded(Module):
    """Its layers are sharded by FSDP2."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class Watch(pl.Callback):  # type: ignore[misc]
    """Notes each batch and each update."""

    def __init__(self, ours: MolsCallback | None) -> None:
        self.seen: dict[str, Any] = {"counts": [], "lrs": [], "phases": [], "data": [], "saved": {}}
        self.updates, self.ours = 0, ours

    def engine(self, trainer: Any) -> Any:
        """DeepSpeed's engine; without DeepSpeed an object with the same attributes."""
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            return trainer.strategy.model
        return Plain(trainer.lightning_module, self.ours and self.ours.mols, trainer.global_step)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.seen["data"].append(digest(batch))
        self.lr = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        engine, step = self.engine(trainer), trainer.global_step
        if step == self.updates:
            return
        self.updates = step
        self.seen["counts"].append((step, engine.global_steps, engine.micro_steps))
        self.seen["lrs"].append(self.lr)
        self.seen["phases"].append(phase_of(engine))
        self.seen["kinds"] = kinds_of(trainer.strategy.model)
        for part, update in SAVED.items():
            if update == step and hasattr(engine, "mols"):
                self.seen["saved"][part] = saved_in(engine, step)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.updates = trainer.global_step


def logged(out: str) -> list[dict[str, Any]]:
    """Rows of CSVLogger, one an update, with our keys."""
    path = Path(out, "log", "metrics.csv")
    if not path.exists():  # not on rank 0
        return []
    rows: dict[int, dict[str, Any]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            update = int(row["step"]) + 1
            values = {k: float(v) for k, v in row.items() if v and k not in ("step", "epoch", "epoch loss", "val")}
            rows.setdefault(update, {"update": update}).update(values)
    return [rows[update] for update in sorted(rows)]


def train(run: Run, way: str = "argument") -> dict[str, Any]:
    """`way`: "argument" or "config" (where the callback finds the section), or "patch" or
    "config alone" without a callback; "fsdp2": ModelParallelStrategy."""
    pl.seed_everything(3)
    config: dict[str, Any] = {"zero_allow_untested_optimizer": True, "zero_optimization": zero_section(run.stage)}
    if run.section is not None and way not in ("argument", "fsdp2"):
        config["mols"] = run.section
    world, ours = int(os.environ["WORLD_SIZE"]), None
    if run.section is not None and way in ("argument", "config", "fsdp2"):
        ours = MolsCallback(None if way == "config" else run.section)
    watch = Watch(ours)
    callbacks: list[Any] = [watch, *([] if ours is None else [ours])]
    keeper = None
    if run.save:
        keeper = ModelCheckpoint(dirpath=run.out, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    elif run.evaluate:
        keeper = ModelCheckpoint(dirpath=run.out, filename="{step}", monitor="val", save_top_k=1)
    if keeper is not None:
        callbacks.append(keeper)
    if way == "patch":
        mols_ds.patch()
    strategy: Any = OnCpu(config=config)
    if run.stage == PLAIN:
        strategy = "ddp" if world > 1 else "auto"
    if way == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    clip = CLIP if run.stage == PLAIN else None
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, max_steps=STEPS,
        gradient_clip_val=clip, plugins=PLUGINS, precision=None if PLUGINS else "32-true",
        accumulate_grad_batches=MICROS, log_every_n_steps=1, logger=CSVLogger(run.out, "log", ""), callbacks=callbacks,
        default_root_dir=run.out, enable_checkpointing=keeper is not None, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=run.evaluate,
    )  # fmt: skip
    environment = dict(os.environ)
    rows = (Examples().rows * 10)[: EPOCH * MICROS * BATCH * world]
    if not run.evaluate:
        rows = rows[int(os.environ["RANK"]) :: world]
    resume = None if run.resume is None else f"{run.saved}/step={SAVED[run.resume]}.ckpt"
    held_out = torch.utils.data.DataLoader(rows[: 2 * BATCH], batch_size=BATCH) if run.evaluate else None
    try:
        trainer.fit(
            Sharded() if way == "fsdp2" else Module(), Resumable(rows, batch_size=BATCH), held_out, ckpt_path=resume
        )
    finally:
        mols_ds.unpatch()
        os.environ.update(environment)  # Lightning takes WORLD_SIZE away when it is done
    seen: dict[str, Any] = {**watch.seen, **end_of(watch.engine(trainer))}
    metrics = {k: float(v) for k, v in trainer.logged_metrics.items() if not k.startswith("mols/")}
    kept = kept_in(run.out, "*.ckpt")
    best = None if keeper is None else (Path(keeper.best_model_path).name, str(keeper.best_model_score))
    logs = [{**row, "lr": lr} for row, lr in zip(logged(run.out)[-len(seen["lrs"]) :], seen["lrs"], strict=False)]
    if not run.evaluate:
        seen["random"] = "not kept"  # Lightning's checkpoints have no random state
    return {**seen, "logs": logs, "same": {"metrics": metrics, "kept": kept, "best": best, "data": seen["data"]}}
