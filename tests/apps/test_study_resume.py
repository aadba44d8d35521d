"""An interrupted run of a study continues from its own checkpoint and ends like an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.harness import ROOT, run_cases

pytestmark = pytest.mark.tier("all")
STEPS, SAVED, STOPPED = 12, 4, 7


def interrupt(folder: str) -> dict[str, Any]:
    """On one rank: the run without interruption, and the one that ends in its 7th update and is started again."""
    from mols_ds.apps.study import work
    from mols_ds.apps.study.runs import Store, StudyRun
    from mols_ds.apps.study.spec import load_study

    study = load_study(ROOT / "studies" / "smoke.yaml")
    arms = {name: arm for name, arm in study.arms.items() if name == "adam"}
    changes = {"save_every": SAVED, "arms": arms, "models": {"block": study.models["block"]}}
    study = study.model_copy(update={**changes, "budget": study.budget.model_copy(update={"steps": STEPS})})
    study = study.model_copy(update={"snr": study.snr.model_copy(update={"every": 2})})  # type: ignore[union-attr]
    run = StudyRun("block", "adam", (("lr", 4e-3),), 1)
    whole = work.Worker(study, Store(study, Path(folder, "whole"))).execute(run)

    class Stop(Exception):
        pass

    read = work.KeptWatch.__call__

    def stops(self: Any, engine: Any) -> None:
        read(self, engine)
        if engine.global_steps == STOPPED:
            raise Stop

    worker = work.Worker(study, Store(study, Path(folder, "parts")))
    work.KeptWatch.__call__ = stops  # type: ignore[method-assign]
    try:
        worker.execute(run)
        stopped = False
    except Stop:
        stopped = True
    finally:
        work.KeptWatch.__call__ = read  # type: ignore[method-assign]
    saved = [path.name for path in worker.store.folder(run).glob("checkpoints/step*")]
    return {"whole": whole, "parts": worker.execute(run), "stopped": stopped, "saved": saved}


def test_an_interrupted_run_goes_on_from_its_checkpoint_with_its_snr_curve(tmp_path: Path) -> None:
    (found,) = run_cases(interrupt, 1, [(str(tmp_path),)], timeout=150)[(str(tmp_path),)]
    assert found["stopped"] and found["saved"] == ["step4"]
    whole, parts = found["whole"], found["parts"]
    assert parts["val_loss"] == whole["val_loss"]
    assert parts["curve"] == whole["curve"] and parts["val_curve"] == whole["val_curve"]
    assert parts["snr"]["step"] == [2, 4, 6, 8, 10, 12]
    assert parts["snr"] == whole["snr"]
