"""What MoLS promises about loops that it does not own: the schedule in a probe window, the order of attach and load."""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from typing import Any

import deepspeed
import pytest
import torch

import mols_ds
from tests.engines.deepspeed.engines import config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.models import model_of
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

SECTION = {"start": 2, "samples": 4, "ramp_end": 8, "report_dir": "report"}
RUNS_ON = "a schedule that the loop steps itself advances by 4 steps meanwhile"
STANDS_STILL = "the update count and the schedule do not advance"
ASKS = "a schedule that waits for optimizer_step_was_skipped (Trainer, Accelerate) does not advance"


def announced(stage: int, way: str) -> dict[str, Any]:
    """What a window announces, and what became of the schedule in it; `way`: whose the scheduler is, or "patch"."""
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    mine = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    arguments = {"lr_scheduler": mine} if way == "engine" else {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if way == "patch":
            mols_ds.patch()
        initialize = deepspeed.initialize if way == "patch" else mols_ds.initialize
        engine = engine_of(config(stage, SECTION, micros=1), model, optimizer, initialize=initialize, **arguments)
        mols_ds.unpatch()
        rates = []
        for step in range(7):
            iterate(engine, step, 1)
            if way != "engine":
                mine.step()
            rates.append(round(optimizer.param_groups[0]["lr"], 8))
    engine.destroy()
    return {"said": said.getvalue(), "stood still": len(set(rates[1:6])) == 1}


def order() -> dict[str, str]:
    """Attach late, and after loading a checkpoint. Returns errors and warnings."""
    first = engine_of(config(2, SECTION, micros=1))
    stock = engine_of(config(2, micros=1), initialize=deepspeed.initialize)
    for step in range(7):
        iterate(first, step, 1)
        if step < 3:
            iterate(stock, step, 1)
    first.save_checkpoint("ours")
    stock.save_checkpoint("stock")
    found = {}

    def note(name: str, engine: Any, section: dict[str, Any] = SECTION) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                mols_ds.attach(engine, section)
                lines = [str(w.message) for w in caught if issubclass(w.category, mols_ds.MolsWarning)]
                found[name] = " | ".join([engine.mols.phase, *lines])
            except mols_ds.MolsError as error:
                found[name] = f"{type(error).__name__}: {error}"

    def loaded(folder: str, watched: bool = True, **options: Any) -> Any:
        engine = engine_of(config(2, micros=1), initialize=deepspeed.initialize)
        if watched:
            engine.load_checkpoint(folder, **options)
        else:
            deepspeed.DeepSpeedEngine.load_checkpoint.__wrapped__(engine, folder)
        return engine

    note("late", stock)
    note("in time", engine_of(config(2, micros=1), initialize=deepspeed.initialize))
    note("ours", loaded("ours"))
    note("ours, start later", loaded("ours"), {**SECTION, "start": 50, "ramp_end": 60})
    note("ours, given alphas", loaded("ours"), {**SECTION, "fixed_alphas": {"qk": 0.5}})
    weights = loaded("ours", load_module_only=True)
    note("ours, weights alone", weights)
    weights.mols.detach()
    for step in range(3):
        iterate(weights, step, 1)
    note("weights alone, later", weights)
    note("stock", loaded("stock"))
    note("nobody looked", loaded("stock", watched=False))
    taken = engine_of(config(2, SECTION, micros=1))
    taken.load_checkpoint("ours")
    taken.mols.detach()
    note("taken, detached", taken)
    return found


def refusals() -> dict[str, str]:
    """Objects that users pass instead of the engine."""
    engine = engine_of(config(2, micros=1), initialize=deepspeed.initialize)
    things = {
        "model": torch.nn.Linear(4, 4),
        "unwrapped": engine.module,
        "optimizer": engine.optimizer,
        "nothing": None,
    }
    found = {}
    for name, thing in things.items():
        with pytest.raises(mols_ds.MolsConfigError) as raised:
            mols_ds.attach(thing, SECTION)
        found[name] = str(raised.value)
    return found


WORK = {"announced": announced, "order": order, "refusals": refusals}
WINDOWS = [(0, "loop"), (2, "loop"), (2, "engine"), (2, "patch"), (3, "patch"), (0, "patch")]
CASES: Cases[tuple[Any, ...]] = Cases(
    [*(("announced", *window) for window in WINDOWS), ("order",), ("refusals",)], quick=[("refusals",)]
)


def one(kind: str, *rest: Any) -> Any:
    return WORK[kind](*rest)  # type: ignore[operator]


@functools.cache
def results() -> Results:
    return run_cases(one, 1, CASES.wanted)


@CASES.parametrize(("stage", "way"), WINDOWS, reads=lambda window: [("announced", *window)])
def test_the_schedule_stands_still_only_where_it_is_said(stage: int, way: str) -> None:
    (seen,) = results()["announced", stage, way]
    expected = STANDS_STILL if way == "engine" else ASKS if (way == "patch" and stage > 0) else RUNS_ON
    assert expected in seen["said"]
    assert [text for text in (STANDS_STILL, ASKS, RUNS_ON) if text in seen["said"]] == [expected]
    assert seen["stood still"] == (way == "engine")


@CASES.reads(("order",))
def test_attach_comes_before_the_load() -> None:
    (seen,) = results()["order",]
    advice = "attach MoLS before engine.load_checkpoint"
    assert seen["in time"] == "waiting"
    assert "MoLS is attached at step 3, past mols.start (step 2). In a resumed run, attach MoLS before" in seen["late"]
    assert seen["stock"].startswith("calibrating | MoLS is attached at step 3")
    assert seen["ours"].startswith("MolsCheckpointError: this engine loaded a checkpoint with MoLS state")
    assert "before MoLS could check whether it has MoLS state" in seen["nobody looked"]
    assert all(advice in seen[name] for name in ("ours", "nobody looked", "stock"))
    assert seen["ours, start later"] == seen["ours, weights alone"] == "waiting"
    assert seen["ours, given alphas"].startswith(("ramping", "fixed"))
    assert seen["weights alone, later"].startswith("calibrating | MoLS is attached at step 3")
    assert seen["taken, detached"].startswith("calibrating | MoLS is attached at step 3")


@CASES.reads(("refusals",))
def test_what_is_no_engine_is_refused_by_what_to_pass() -> None:
    (seen,) = results()["refusals",]
    for name, kind in (("model", "Linear"), ("optimizer", "DeepSpeedZeroOptimizer"), ("nothing", "NoneType")):
        assert seen[name].startswith(
            f"mols_ds.attach: {kind} is not a DeepSpeed engine; pass what deepspeed.initialize"
        )
    assert all("trainer.model_wrapped" in line for line in seen.values())
