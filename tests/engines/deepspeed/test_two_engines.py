"""Two engines of one process that name one report_dir, as a GAN's: each has its own report; one after the other, the
last."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import mols_ds
from mols_ds.report.files import load_report
from tests.engines.deepspeed.engines import config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.helpers.harness import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.tier("all")]

SECTION: dict[str, Any] = {"start": 0, "ramp_end": 8, "samples": 4, "noise_floor_correction": False}


def gan(folder: str) -> tuple[Any, ...]:
    """On each rank: reports of two engines that train in turns, files on disk, and warnings."""
    section = {**SECTION, "report_dir": folder}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engines = [engine_of(config(stage, section)) for stage in (0, 3)]
        for step in range(6):
            for engine in engines:
                iterate(engine, step)
        reports = [engine.mols.report() for engine in engines]
        engines[1].mols.detach()
        again = mols_ds.attach(engines[1], {**section, "start": 2, "samples": 5, "mode": "online"})
        for step in range(6, 13):
            iterate(engines[1], step)
    said = [str(warning.message) for warning in caught if "another engine" in str(warning.message)]
    return reports, again.report(), said


def test_each_of_two_engines_keeps_its_report(tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    (reports, again, said), (others, _, quiet) = run_ranks(gan, 2, str(folder))
    assert reports == others and quiet == []
    assert load_report(folder) == reports[0]
    # The second engine was detached and attached again: its folder was free, and is used as before.
    assert load_report(f"{folder}-2") == again != reports[1]
    assert len(said) == 2 and all(f"{folder}-2" in line for line in said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reports", "reports-2"]
