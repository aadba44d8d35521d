"""The controller passes a new report to rank 0's `publish` once, and continues after any error there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from mols_ds.core.config import MolsConfig
from mols_ds.core.controller import Controller
from mols_ds.core.groups import ElementLayout, GroupTable
from mols_ds.core.phases import Schedule
from mols_ds.core.protocols import Context
from mols_ds.core.schema import Report, schema_problem
from mols_ds.errors import MolsWarning
from mols_ds.report.files import JSON_NAME, Publisher, load_report


def controller(publish: Any, rank: int = 0) -> Controller:
    table = GroupTable({"w": ElementLayout.whole("vo")}, {"w": (8,)})
    config = MolsConfig.parse({"fixed_alphas": {"vo": 2.0}, "start": 2, "ramp_end": 20})
    context = Context(lambda x: x, torch.device("cpu"), rank, {"data": 2}, {}, log=lambda _: None, publish=publish)
    return Controller(config, table, [], Schedule(2, 20), context)


def test_rank_0_publishes_the_report_when_the_alphas_exist() -> None:
    seen: list[Report] = []
    made = controller(lambda report: seen.append(copy.deepcopy(report)))
    made.advance(1)
    assert seen == [] and made.report() == {}
    made.advance(2)
    made.advance(3)
    assert seen == [made.report()]
    assert schema_problem(seen[0]) is None
    assert (seen[0]["step"], seen[0]["mode"], seen[0]["groups"]["vo"]["alpha"]) == (2, "fixed", 2.0)


def test_other_ranks_publish_nothing_and_have_the_same_report() -> None:
    seen: list[Report] = []
    first, second = controller(seen.append), controller(seen.append, rank=1)
    for made in (first, second):
        made.advance(2)
    assert len(seen) == 1
    assert first.report() == second.report() != {}


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("no font"), KeyError("x")])
def test_whatever_fails_there_is_a_warning_and_training_goes_on(error: Exception) -> None:
    def publish(report: Report) -> None:
        raise error

    made = controller(publish)
    with pytest.warns(MolsWarning, match="the report could not be written"):
        made.advance(2)
    assert made.phase == "ramping" and made.alphas == {"vo": 2.0}


def test_a_log_that_fails_ends_nothing() -> None:
    def closed(message: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    made = controller(None)
    made.context.log = closed
    made.advance(2)
    assert made.phase == "ramping"


def test_nobody_needs_to_want_it() -> None:
    made = controller(None)
    made.advance(2)
    assert made.phase == "ramping"


def test_the_adapters_publisher_shows_the_table_and_writes_the_files(tmp_path: Path) -> None:
    said: list[str] = []
    made = controller(Publisher(str(tmp_path / "out"), said.append))
    made.advance(2)
    assert len(said) == 1 and "alphas from fixed_alphas" in said[0]
    assert load_report(tmp_path / "out" / JSON_NAME) == made.report()


def test_two_engines_with_one_folder_keep_both_reports(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folders = (tmp_path / "out", tmp_path / "out-2")
    publishers = [Publisher(str(folders[0]), lambda _: None) for _ in folders]
    first, second = map(controller, publishers)
    first.advance(2)
    assert not [w for w in recwarn if "another engine" in str(w.message)]
    with pytest.warns(MolsWarning, match=r"mols\.report_dir='.*out' has the report of another engine.*out-2"):
        second.advance(2)
    second.report()["step"] = 0
    recwarn.clear()
    for made, report, folder in zip(publishers, (first.report(), second.report()), folders, strict=True):
        made({**report, "samples": 7 if folder == folders[1] else 5})  # a recalibration: each replaces its own
    assert [load_report(folder)["samples"] for folder in folders] == [5, 7]
    assert not recwarn.list


def test_a_detached_engine_gives_its_folder_free(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for step in (2, 3):
        publish = Publisher(str(tmp_path / "out"), lambda _: None)
        controller(publish).advance(step)
        publish.release()
        publish.release()
    assert load_report(tmp_path / "out")["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_log_that_fails_costs_no_report(tmp_path: Path) -> None:
    def closed(message: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    controller(Publisher(str(tmp_path / "out"), closed)).advance(2)
    assert load_report(tmp_path / "out")["step"] == 2
