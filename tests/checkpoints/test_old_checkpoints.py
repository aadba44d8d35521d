"""Checkpoints of release 0.4.0 load, and a run that continues from one gives the results of 0.4.0.

The fixtures, and what belongs to each, are described in write_fixtures.py. They are never written again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import job_runs
from tests.checkpoints.comparing import FIXTURES, differences, merge, read, without_intervals
from tests.checkpoints.outcomes import (
    DEEPSPEED,
    JOBS,
    MEGATRON,
    WORLD,
    deepspeed_outcomes,
    job_outcomes,
    megatron_outcomes,
)

MACHINE = (b"/tmp", b"/work", b"/root", b"/home", b"site-packages")  # an absolute path has one of these
MODULES = (b"mols_ds", b"megatron_patches")


def check_preconditions(settings: dict[str, Any], loaded: dict[str, Any]) -> None:
    """The fixture is in its named phase, and has the state that makes this phase hard to load."""
    section, phase = settings.get("ds_config", settings)["mols"], settings["phase"]
    assert loaded["phase"] == phase
    assert loaded["accumulators"] == (0 < loaded["samples"] < section["samples"]) == (phase == "calibrating")
    assert any(abs(alpha - 1) > 0.01 for alpha in loaded["alphas"].values()) == (phase in ("ramping", "fixed"))


def check_results(name: str, expected: dict[str, Any], found: dict[str, Any]) -> None:
    if name.endswith("-waiting"):
        expected, found = without_intervals(expected), without_intervals(found)
    assert differences(expected, found, name) == []


@pytest.mark.distributed
@DEEPSPEED.parametrize("name")
def test_deepspeed_run_goes_on_as_under_0_4_0(name: str) -> None:
    settings, expected = read(name, "settings.json"), read(name, "expected.json")
    check_preconditions(settings, expected["loaded"])
    check_results(name, expected, merge(deepspeed_outcomes()[(name,)]))


@pytest.mark.distributed
@MEGATRON.parametrize("name")
def test_megatron_run_goes_on_as_under_0_4_0(name: str) -> None:
    settings, expected = read(name, "settings.json"), read(name, "expected.json")
    check_preconditions(settings, expected["loaded"])
    check_results(name, expected, merge(megatron_outcomes()[(name,)]))


@pytest.mark.parametrize("name", [name for name in DEEPSPEED if "calibrating" in name])
def test_deepspeed_fixture_holds_the_accumulators_of_each_rank(name: str) -> None:
    section = read(name, "settings.json")["ds_config"]["mols"]
    for rank in range(WORLD):
        path = FIXTURES / name / "checkpoint" / "saved" / f"mols_rank_{rank:05d}_of_{WORLD:05d}.pt"
        content = torch.load(path, weights_only=True)  # so no class of ours is in it
        moments = content["samples"]["moments"]
        assert 0 < moments["count"] < section["samples"] and float(moments["m2"].sum()) > 0
        assert (content["random"] is not None) == (section["mode"] == "probe")


@pytest.mark.jobs
@pytest.mark.tier("all")
@pytest.mark.parametrize("name", JOBS)
def test_program_goes_on_from_its_folder_as_under_0_4_0(name: str) -> None:
    expected = read(name, "expected.json")
    first, second = job_outcomes()[(name,)]
    assert differences(expected, first, name) == [] and first == second
    *steps, final = first["metrics"]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1)) and final["final"]


@pytest.mark.parametrize("name", JOBS)
def test_program_was_interrupted_in_the_middle_of_its_calibration(name: str) -> None:
    out = FIXTURES / name / job_runs.START / job_runs.OUT
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert lines[-1]["phase"] == "calibrating" and not any(line.get("final") for line in lines)
    place = out / "checkpoints" / (out / "checkpoints" / "latest").read_text("utf-8")
    listed = json.loads((place / "manifest.json").read_text("utf-8"))["files"]
    assert {str(path.relative_to(place)) for path in place.iterdir()} == {*listed, "manifest.json"}
    assert 0 < samples_in(place) < read(name, "settings.json")["samples"]


def samples_in(place: Path) -> int:
    """Number of gradient samples in a program's checkpoint."""
    common = place / "common.pt"  # Megatron's
    if common.is_file():
        state = torch.load(common, weights_only=False)["optimizer"]["mols"]
    else:
        state = torch.load(place / "mp_rank_00_model_states.pt", weights_only=False)["mols"]
    return int(state["state"]["samples"])


def test_fixtures_name_no_machine_and_no_module_of_ours_and_are_small() -> None:
    """A pickled class of ours would be looked for in the module where it was in 0.4.0; there is none."""
    files = [path for path in FIXTURES.rglob("*") if path.is_file()]
    assert [str(path) for path in files if any(word in path.read_bytes() for word in MACHINE)] == []
    written = [path for path in files if path.suffix != ".json"]
    assert [str(path) for path in written if any(word in path.read_bytes() for word in MODULES)] == []
    assert sum(path.stat().st_size for path in files) < 6e6
