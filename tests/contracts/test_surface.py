"""What release 0.4.0 offered is still there: names, handles, config, commands, report, metrics.

New names, options, keys and optional parameters are welcome; the wording of help texts may change.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from mols_ds import MolsConfig
from tests.contracts import compatible, surface

FOLDER = Path(__file__).resolve().parent / "0.4.0"
HANDLE = ("phase", "alphas", "multipliers", "applied_lrs", "report", "samples", "accumulator_bytes", "detach")
HANDLES = {"deepspeed": HANDLE, "megatron": (*HANDLE, "steps", "resume_from")}
"""What README and docs promise of `engine.mols` and of what `megatron_patches.attach` returns; the rest is internal."""
LAUNCHERS = ("mols-ds launch", "launch/deepspeed")
STOCK = "deepspeed's own launcher"


def snapshot(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


@functools.cache
def now(name: str) -> Any:
    """Today's surface, as plain data."""
    return json.loads(json.dumps(surface.SNAPSHOTS[name]()))


# --- names and config -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", snapshot("names"))
def test_name_is_there_and_takes_the_same_arguments(name: str) -> None:
    assert list(compatible.thing(snapshot("names")[name], now("names").get(name), name)) == []


def test_config_has_the_same_keys_with_the_same_defaults() -> None:
    before, fields = snapshot("config"), now("config")["fields"]
    changed = {
        name: (field["default"], fields.get(name, {}).get("default", "is gone"))
        for name, field in before["fields"].items()
        if name not in fields or field["default"] != fields[name]["default"]
    }
    assert changed == {}


@pytest.mark.parametrize("preset", snapshot("config")["presets"])
def test_preset_gives_the_same_values(preset: str) -> None:
    before, values = snapshot("config")["presets"][preset], now("config")["presets"][preset]
    assert {key: values.get(key) for key in before} == before


@pytest.mark.parametrize("section", surface.ACCEPTED, ids=json.dumps)
def test_config_takes_what_it_took(section: dict[str, Any]) -> None:
    MolsConfig.parse(section)


# --- handles and reports --------------------------------------------------------------------------------------------

ENGINES = [(engine, kind) for engine, kinds in snapshot("engines").items() for kind in kinds]


@pytest.mark.distributed
@pytest.mark.tier("all")
@pytest.mark.parametrize(("engine", "kind"), ENGINES)
def test_handle_has_the_same_attributes(engine: str, kind: str) -> None:
    before, found = snapshot("engines")[engine][kind]["handle"], now("engines")[engine][kind]["handle"]
    assert set(HANDLES[engine]) <= set(before)
    complaints = [line for name in HANDLES[engine] for line in compatible.thing(before[name], found.get(name), name)]
    assert complaints == []
    assert {name: found[name].get("type") for name in HANDLES[engine]} == {
        name: before[name].get("type") for name in HANDLES[engine]
    }


@pytest.mark.distributed
@pytest.mark.tier("all")
@pytest.mark.parametrize(("engine", "kind"), ENGINES)
def test_report_has_the_same_keys_and_types(engine: str, kind: str) -> None:
    before, found = snapshot("engines")[engine][kind]["report"], now("engines")[engine][kind]["report"]
    for part in ("top", "world"):
        assert {key: found[part].get(key) for key in before[part]} == before[part]
    assert set(before["versions"]) <= set(found["versions"])
    assert set(before["group"]) <= set(found["group"])
    for key, types in before["group"].items():
        allowed = {"float", "NoneType"} if {"float", "NoneType"} & set(types) else set(types)
        assert set(found["group"][key]) <= allowed, key


# --- metrics --------------------------------------------------------------------------------------------------------


@pytest.mark.jobs
@pytest.mark.tier("all")
@pytest.mark.parametrize("program", snapshot("metrics"))
def test_metrics_have_the_same_keys_and_types(program: str) -> None:
    before, found = snapshot("metrics")[program], now("metrics")[program]
    assert set(before) == {"step", "evaluated", "final"}
    for kind, keys in before.items():
        assert {key: found[kind].get(key) for key in keys} == keys, kind


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.tier("all")
@pytest.mark.parametrize("name", snapshot("commands"))
def test_command_has_the_same_options(name: str) -> None:
    before, found = snapshot("commands"), now("commands")
    # The launchers take DeepSpeed's own options too, which another version of it may not have.
    gone = before[STOCK]["options"].keys() - found[STOCK]["options"].keys()
    optional = frozenset(gone) if name in (STOCK, *LAUNCHERS) else frozenset()
    assert list(compatible.command(before[name], found[name], name, optional=optional)) == []
    assert "--help" in found[name]["options"] and found[name]["help"]


@pytest.mark.parametrize("module", surface.WITHOUT_OPTIONS)
def test_documented_module_is_there(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


# --- the comparison itself ------------------------------------------------------------------------------------------


def _parameters(*described: str) -> list[dict[str, str]]:
    kinds = {"*": "KEYWORD_ONLY", "": "POSITIONAL_OR_KEYWORD"}
    found = []
    for text in described:
        name, _, default = text.lstrip("*").partition("=")
        kind = kinds["*" if text.startswith("*") else ""]
        found.append({"name": name, "kind": kind, "default": default or surface.REQUIRED})
    return found


@pytest.mark.parametrize(
    ("now", "complaint"),
    [
        (("a", "b=1", "*c=2"), None),
        (("a", "b=1", "d=9", "*c=2", "*e=3"), None),
        (("a=0", "b=1", "c=2"), None),
        (("a", "b=1"), "unexpected keyword argument 'c'"),
        (("a", "b=1", "*c=2", "*d"), "missing a required"),
        (("b=1", "a=0", "*c=2"), "a is now taken as b"),
        (("a", "x=1", "*c=2"), "unexpected keyword argument 'b'"),
        (("a", "b=5", "*c=2"), "the default of b was 1 and is 5"),
        (("a", "*b=1", "*c=2"), "too many positional"),
    ],
)
def test_comparison_sees_calls_that_would_break(now: tuple[str, ...], complaint: str | None) -> None:
    found = list(compatible.parameters(_parameters("a", "b=1", "*c=2"), _parameters(*now), "f"))
    assert found == [] if complaint is None else complaint in " ".join(found)


def test_comparison_sees_commands_that_would_break() -> None:
    flag = {"nargs": 0, "choices": None, "required": False}
    one = {"nargs": None, "choices": ["a", "b"], "required": False}
    before = {"options": {"--x": flag, "--y": one}, "positionals": [{"name": "p", **one}], "subcommands": {}}
    assert list(compatible.command(before, before, "c")) == []
    lacking = {"options": {"--y": {**one, "choices": ["a"]}, "--z": {**one, "required": True}}, "positionals": []}
    said = " ".join(compatible.command({**before, "subcommands": {"s": before}}, {**lacking, "subcommands": {}}, "c"))
    for part in ("no --x", "--y does not take b", "--z is new and required", "takes 0 positionals", "no s any more"):
        assert part in said
