"""Checkpoints that release 0.4.0 wrote load, and a run that goes on from one gives what 0.4.0 gave.

The fixtures, and what belongs to each, are described in write_fixtures.py. They are never written again.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.checkpoints import deepspeed_runs, megatron_runs
from tests.checkpoints.comparing import FIXTURES, differences, merge, read
from tests.helpers.harness import Results, run_cases

WORLD = 2
POINTS = ("waiting", "calibrating", "calibrating-online", "ramping", "fixed")
DEEPSPEED = [f"zero{stage}-{point}" for stage in (0, 1, 2, 3) for point in POINTS]
MACHINE = (b"/tmp", b"/work", b"/root", b"/home", b"site-packages")  # an absolute path has one of these
MODULES = (b"mols_ds", b"megatron_patches")


MEGATRON = [f"megatron-{grid}-{point}" for grid in ("dp2", "tp2") for point in POINTS]


@functools.cache
def deepspeed_outcomes() -> Results:
    return run_cases(deepspeed_runs.continued, WORLD, [(name,) for name in DEEPSPEED])


@functools.cache
def megatron_outcomes() -> Results:
    return run_cases(megatron_runs.continued, WORLD, [(name,) for name in MEGATRON])


def check_preconditions(settings: dict[str, Any], loaded: dict[str, Any]) -> None:
    """The fixture is of the phase that it stands for, and holds what makes this phase hard to load."""
    section, phase = settings.get("ds_config", settings)["mols"], settings["phase"]
    assert loaded["phase"] == phase
    assert loaded["accumulators"] == (0 < loaded["samples"] < section["samples"]) == (phase == "calibrating")
    assert any(abs(alpha - 1) > 0.01 for alpha in loaded["alphas"].values()) == (phase in ("ramping", "fixed"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed_run_goes_on_as_under_0_4_0(name: str) -> None:
    settings, expected = read(name, "settings.json"), read(name, "expected.json")
    check_preconditions(settings, expected["loaded"])
    assert differences(expected, merge(deepspeed_outcomes()[(name,)]), name) == []


@pytest.mark.distributed
@pytest.mark.parametrize("name", MEGATRON)
def test_megatron_run_goes_on_as_under_0_4_0(name: str) -> None:
    settings, expected = read(name, "settings.json"), read(name, "expected.json")
    check_preconditions(settings, expected["loaded"])
    assert differences(expected, merge(megatron_outcomes()[(name,)]), name) == []


@pytest.mark.parametrize("name", [name for name in DEEPSPEED if "calibrating" in name])
def test_deepspeed_fixture_holds_the_accumulators_of_each_rank(name: str) -> None:
    section = read(name, "settings.json")["ds_config"]["mols"]
    for rank in range(WORLD):
        path = FIXTURES / name / "checkpoint" / "saved" / f"mols_rank_{rank:05d}_of_{WORLD:05d}.pt"
        content = torch.load(path, weights_only=True)  # so no class of ours is in it
        moments = content["samples"]["moments"]
        assert 0 < moments["count"] < section["samples"] and float(moments["m2"].sum()) > 0
        assert (content["random"] is not None) == (section["mode"] == "probe")


def test_fixtures_name_no_machine_and_no_module_of_ours_and_are_small() -> None:
    """A pickled class of ours would be looked for in the module where it was in 0.4.0; there is none."""
    files = [path for path in FIXTURES.rglob("*") if path.is_file()]
    assert [str(path) for path in files if any(word in path.read_bytes() for word in MACHINE)] == []
    written = [path for path in files if path.suffix != ".json"]
    assert [str(path) for path in written if any(word in path.read_bytes() for word in MODULES)] == []
    assert sum(path.stat().st_size for path in files) < 6e6
