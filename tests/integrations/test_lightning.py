"""MolsCallback in Lightning's Trainer with the real DeepSpeedStrategy, on gloo.

Lightning refuses a CPU there. Three checks are put aside (`OnCpu`), and nothing else: that the accelerator is CUDA's,
that the devices' numbers fit CUDA_VISIBLE_DEVICES, and the device, which must have a number.
"""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

import lightning.pytorch as pl
import lightning.pytorch.strategies.deepspeed as strategies
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from transformers import get_linear_schedule_with_warmup

import mols_ds
from mols_ds.integrations.lightning import MolsCallback
from tests.engines.deepspeed.state import full_weights
from tests.helpers.digests import digest
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases
from tests.integrations.trainers import Examples, model, own_folder

pytestmark = pytest.mark.distributed

STEPS, EPOCH, MICROS, SAMPLES, START, RAMP_END = 20, 5, 2, 4, 7, 12
SECTION: dict[str, Any] = {
    "start": START,
    "samples": SAMPLES,
    "ramp_end": RAMP_END,
    "noise_floor_correction": False,
    "estimator": "mean",
    "report_dir": "report",
}
CLAMPED = {"alpha_min": 1.0, "alpha_max": 1.0}
ONLINE = {"mode": "online", "samples": 5, "ramp_end": 14}


class OnCpu(DeepSpeedStrategy):  # type: ignore[misc]
    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)


class Module(pl.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.model = model()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss)
        self.log("epoch loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        plan = get_linear_schedule_with_warmup(optimizer, 2, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plan, "interval": "step"}}


class Watch(pl.Callback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.rows: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        engine = trainer.strategy.model
        if (batch_idx + 1) % MICROS == 0:
            phase = engine.mols.phase if hasattr(engine, "mols") else "stock"
            lr = float(trainer.optimizers[0].param_groups[0]["lr"])
            self.rows.append((trainer.global_step, engine.global_steps, engine.micro_steps, lr, phase))


def fit(
    stage: int,
    mols: dict[str, Any] | None,
    out: str,
    *,
    way: str = "config",
    save: bool = False,
    resume: str | None = None,
) -> dict[str, Any]:
    strategies._validate_device_index_selection = lambda devices: None
    pl.seed_everything(3)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100}
    config: dict[str, Any] = {"zero_allow_untested_optimizer": True, "zero_optimization": zero}
    section = None if mols is None else SECTION | mols
    if section is not None and way != "argument":
        config["mols"] = section
    watch, world = Watch(), int(os.environ["WORLD_SIZE"])
    callbacks: list[Any] = [watch]
    if section is not None and way != "patch":
        callbacks.append(MolsCallback(section if way == "argument" else None))
    if save:
        callbacks.append(ModelCheckpoint(dirpath=out, filename="{step}", every_n_epochs=1, save_top_k=-1))
    if way == "patch":
        mols_ds.patch()
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=OnCpu(config=config), max_steps=STEPS, precision="32-true",
        accumulate_grad_batches=MICROS, log_every_n_steps=1, logger=CSVLogger(out, "log", ""), callbacks=callbacks,
        default_root_dir=out, enable_checkpointing=save, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    environment = dict(os.environ)
    rows = (Examples().rows * 10)[: EPOCH * MICROS * 2 * world]
    try:
        trainer.fit(Module(), torch.utils.data.DataLoader(rows, batch_size=2), ckpt_path=resume)
    finally:
        mols_ds.unpatch()
        os.environ.update(environment)  # Lightning takes WORLD_SIZE away when it is done
    engine = trainer.strategy.model
    seen: dict[str, Any] = {
        "rows": watch.rows,
        "weights": {name: digest(weight) for name, weight in full_weights(engine).items()},
        "random": digest(torch.get_rng_state()),
        "saved": sorted(path.name for path in Path(out).glob("*.ckpt")),
        "metrics": {k: float(v) for k, v in trainer.logged_metrics.items() if not k.startswith("mols/")},
        "logs": {k: float(v) for k, v in trainer.logged_metrics.items() if k.startswith("mols/")},
    }
    if hasattr(engine, "mols"):
        seen |= {"alphas": engine.mols.alphas, "multipliers": engine.mols.multipliers, "lrs": engine.mols.applied_lrs}
    engine.destroy()
    return seen


def counts(stage: int) -> dict[str, Any]:
    found = {
        "stock": fit(stage, None, "stock"),
        "clamped": fit(stage, CLAMPED, "clamped"),
        "real": fit(stage, {}, "real"),
    }
    return {**found, "argument": fit(stage, {}, "argument", way="argument")}


def resume(stage: int, mode: str) -> dict[str, Any]:
    """From each checkpoint: the stock run, one whose alphas are clamped to 1, and one as it is meant.

    Lightning's own resumed runs under DeepSpeed are not bit for bit the uninterrupted ones (2.6.6, without MoLS), so
    each is compared with the stock run that was resumed from the same step.
    """
    more = ONLINE if mode == "online" else {}
    settings = {"stock": None, "clamped": more | CLAMPED, "mols": more}
    found = {name: {"whole": fit(stage, mols, name, save=True)} for name, mols in settings.items()}
    for name, mols in settings.items():
        for step in range(EPOCH, STEPS, EPOCH):
            found[name][step] = fit(stage, mols, f"{name}{step}", resume=f"{name}/step={step}.ckpt")
    return found


def patch(stage: int) -> dict[str, Any]:
    return {"patch": fit(stage, ONLINE, "patch", way="patch"), "callback": fit(stage, ONLINE, "callback")}


def refusals() -> dict[str, str]:
    found = {}
    for name, strategy, section in (
        ("ddp", DDPStrategy(), SECTION),
        ("none", OnCpu(config={"zero_optimization": {}}), None),
    ):
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, strategy=strategy, max_steps=1, logger=False,
            callbacks=[MolsCallback(section)], enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        strategies._validate_device_index_selection = lambda devices: None
        with pytest.raises(mols_ds.MolsError) as raised:
            trainer.fit(Module(), torch.utils.data.DataLoader(Examples().rows, batch_size=2))
        found[name] = str(raised.value)
    return found


WORK = {"counts": counts, "resume": resume, "patch": patch, "refusals": refusals}
Case = tuple[Any, ...]
TABLE: list[Case] = [
    *((world, "counts", stage) for world in (1, 2) for stage in (2, 3)),
    *((world, "resume", stage, mode) for world in (1, 2) for stage in (2, 3) for mode in ("probe", "online")),
    (1, "patch", 2),
    (1, "refusals"),
]
IN_ALL = [(1, "counts", 3), (2, "counts", 2), (1, "resume", 2, "probe"), (2, "resume", 3, "online"), (1, "patch", 2)]
CASES: Cases[Case] = Cases(TABLE, full=lambda case: case not in [*IN_ALL, (1, "refusals")])


def one(kind: str, *rest: Any) -> Any:
    with contextlib.chdir(own_folder(f"{kind}{rest}")):
        return WORK[kind](*rest)  # type: ignore[operator]


@functools.cache
def runs(world: int) -> Results:
    return run_cases(one, world, [case[1:] for case in CASES.wanted if case[0] == world], timeout=240)


PLACES = [(world, stage) for world in (1, 2) for stage in (2, 3)]


def without_phase(seen: dict[str, Any]) -> list[Any]:
    return [row[:-1] for row in seen["rows"]]


@CASES.parametrize(("world", "stage"), PLACES, reads=lambda value: [(value[0], "counts", value[1])])
def test_the_run_is_the_stock_one(world: int, stage: int) -> None:
    """With alphas of 1: weights, counts, schedule and what the module logs, bit for bit."""
    for seen in runs(world)["counts", stage]:
        stock, clamped = seen["stock"], seen["clamped"]
        assert set(clamped["alphas"].values()) == {1.0}
        for key in ("weights", "random", "metrics"):
            assert clamped[key] == stock[key], key
        assert without_phase(clamped) == without_phase(stock) == without_phase(seen["real"])
        assert stock["rows"][-1][:2] == (STEPS, STEPS)


@CASES.parametrize(("world", "stage"), PLACES, reads=lambda value: [(value[0], "counts", value[1])])
def test_logs_and_the_section_as_an_argument(world: int, stage: int) -> None:
    for seen in runs(world)["counts", stage]:
        real, logs = seen["real"], seen["real"]["logs"]
        assert len(set(real["alphas"].values())) > 2
        for kind, values in (("alpha", "alphas"), ("multiplier", "multipliers"), ("lr", "lrs")):
            for group, value in real[values].items():
                assert logs[f"mols/{kind}/{group}"] == pytest.approx(value, rel=1e-6)  # Lightning keeps float32
        assert seen["argument"]["weights"] == real["weights"]


PHASES = {"probe": ["waiting", "ramping", "fixed"], "online": ["waiting", "calibrating", "fixed"]}
RESUMED = [case for case in TABLE if case[1] == "resume"]


@CASES.parametrize(("world", "kind", "stage", "mode"), RESUMED)
def test_ckpt_path_keeps_the_alphas(world: int, kind: str, stage: int, mode: str) -> None:
    for seen in runs(world)[kind, stage, mode]:
        whole = seen["mols"]["whole"]
        phases = {row[0]: row[-1] for row in whole["rows"]}
        assert [phases[step] for step in range(EPOCH, STEPS, EPOCH)] == PHASES[mode]
        for step in range(EPOCH, STEPS, EPOCH):
            assert seen["clamped"][step]["weights"] == seen["stock"][step]["weights"], step
            resumed = seen["mols"][step]
            # After a resume the engine's boundaries are one batch ahead of Lightning's, at which `Watch` looks
            found = {row[0]: row[-1] for row in resumed["rows"] if row[0] != START}
            assert found == {t: phases[t] for t in range(step + 1, STEPS + 1) if t != START}
            if phases[step] in ("ramping", "fixed"):
                assert resumed["alphas"] == whole["alphas"]
                assert resumed["multipliers"] == whole["multipliers"]


@CASES.reads((1, "patch", 2))
def test_patch_alone_serves_a_mode_that_takes_every_step() -> None:
    (seen,) = runs(1)["patch", 2]
    assert seen["patch"]["weights"] == seen["callback"]["weights"]
    assert len(set(seen["patch"]["alphas"].values())) > 2


@CASES.reads((1, "refusals"))
def test_a_section_is_never_silently_ignored() -> None:
    (seen,) = runs(1)["refusals",]
    assert "the strategy is DDPStrategy; use Trainer(strategy=DeepSpeedStrategy(...))" in seen["ddp"]
    assert 'no "mols" section' in seen["none"]
