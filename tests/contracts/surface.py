"""What others can rely on, read from the code as it is: names, handles, config, commands, report, metrics.

Each function returns plain JSON data. write_snapshots.py wrote that of release 0.4.0 to a file, and test_surface.py
compares it with today's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import inspect
import io
import json
import os
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tests.helpers.harness import ROOT, run_cases

OURS = ("mols_ds", "megatron_patches")
MORE_NAMES = ("megatron_patches.mpu.DeepSpeedMpu",)  # documented, but not exported by its package
REQUIRED = "required"
"""The default of a parameter that has none."""


# --- names ----------------------------------------------------------------------------------------------------------


def parameters(signature: inspect.Signature) -> list[dict[str, str]]:
    """Name, kind and default of each parameter, but `self`."""
    return [
        {
            "name": p.name,
            "kind": p.kind.name,
            "default": REQUIRED if p.default is inspect.Parameter.empty else repr(p.default),
        }
        for p in signature.parameters.values()
        if p.name not in ("self", "cls")
    ]


def describe(thing: Any) -> dict[str, Any]:
    """A function's parameters; a class's bases, parameters and members."""
    if not inspect.isclass(thing):
        return {"kind": "function", "parameters": parameters(inspect.signature(thing))}
    bases = [base.__name__ for base in thing.__mro__[1:-1]]
    if issubclass(thing, BaseException):
        return {"kind": "error", "bases": bases}
    found = {
        "kind": "class",
        "bases": [base for base in bases if not base.startswith("_") and base != "BaseModel"],
        "members": members(thing),
    }
    if not issubclass(thing, BaseModel):  # whose parameters are its fields, see `config`
        found["parameters"] = parameters(inspect.signature(thing))
    return found


def members(owner: type) -> dict[str, Any]:
    """Public methods and attributes that a class of this project defines."""
    found: dict[str, Any] = {}
    for base in owner.__mro__:
        if not base.__module__.startswith(OURS):
            continue
        declared = [*vars(base), *getattr(base, "__annotations__", {})]
        for name in declared:
            if name.startswith("_") or name in ("model_config",) or name in found:
                continue
            found[name] = member(getattr(owner, name, None))
    return dict(sorted(found.items()))


def member(value: Any) -> dict[str, Any]:
    """A method with its parameters, or an attribute."""
    if inspect.isroutine(value):
        return {"kind": "method", "parameters": parameters(inspect.signature(value))}
    return {"kind": "attribute"}


def names() -> dict[str, Any]:
    """Every name of `__all__` of the two packages, and a few documented ones beside."""
    found: dict[str, Any] = run_cases(_names, 1, [()])[()][0]  # on a rank: megatron.core is imported there alone
    return found


def _names() -> dict[str, Any]:
    import deepspeed

    found = {}
    for package in OURS:
        module = importlib.import_module(package)
        for name in sorted(module.__all__):
            found[f"{package}.{name}"] = describe(getattr(module, name))
    for path in MORE_NAMES:
        place, _, name = path.rpartition(".")
        found[path] = describe(getattr(importlib.import_module(place), name))
    # 0.4.0 takes whatever deepspeed.initialize takes, by *args and **kwargs; a later release may write that out
    initialize = found["mols_ds.initialize"]
    if {p["kind"] for p in initialize["parameters"]} == {"VAR_POSITIONAL", "VAR_KEYWORD"}:
        initialize["parameters"] = parameters(inspect.signature(deepspeed.initialize))
    return found


# --- config ---------------------------------------------------------------------------------------------------------


def config() -> dict[str, Any]:
    """Fields of the "mols" section with types, and the values that each preset gives."""
    from mols_ds import MolsConfig

    fields = {
        name: {"type": str(field.annotation), "default": json.loads(json.dumps(_plain(field.default)))}
        for name, field in MolsConfig.model_fields.items()
    }
    presets = {name: MolsConfig.parse({"preset": name}).model_dump(mode="json") for name in ("robust", "paper")}
    return {"fields": fields, "presets": presets}


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


ACCEPTED: list[dict[str, Any]] = [
    {},
    {"enabled": False},
    {"preset": "robust"},
    {"preset": "paper"},
    {"start": 0, "ramp_end": 0},
    {"start": 0.0, "ramp_end": 1.0},
    {"start": 100, "ramp_end": 0.5},
    {"ramp_end": "auto"},
    {"samples": 4},
    {"samples": 2, "noise_floor_correction": False},
    {"samples": "auto", "max_samples": 16, "alpha_rtol": 0.5},
    {"mode": "probe"},
    {"mode": "online"},
    {"mode": "moments"},
    {"estimator": "mean"},
    {"estimator": "median"},
    {"estimator": "pooled"},
    {"estimator": "damping"},
    {"reference": "max"},
    {"reference": "mlp"},
    {"alpha_min": None, "alpha_max": None},
    {"alpha_min": 1.0, "alpha_max": 1.0},
    {"ramp": "linear"},
    {"ramp": "cosine"},
    {"granularity": "type"},
    {"granularity": "layer_type"},
    {"rules": [["embed", "embedding"]]},
    {"accumulators": {"device": "cpu", "dtype": "float32"}},
    {"accumulators": {"device": "accelerator"}},
    {"recalibrate": {"every": 1}},
    {"fixed_alphas": {"qk": 2.0, "mlp": 0.5}},
    {"total_steps": 1},
    {"report_dir": "somewhere"},
]
"""Sections that are valid; a later release must take them too."""


# --- handles and reports --------------------------------------------------------------------------------------------

WORLD = 2


def handle(thing: Any) -> dict[str, Any]:
    """Public methods and attributes of an object."""
    found = {}
    for name in dir(thing):
        if not name.startswith("_"):
            value = getattr(thing, name)
            found[name] = member(value)
            if found[name]["kind"] == "attribute" and isinstance(value, (str, int, float, dict, list, tuple)):
                found[name]["type"] = type(value).__name__
    return found


def engines(which: str) -> dict[str, Any]:
    """On each rank: the handles of an engine, with MoLS and without, and the reports that it gives."""
    return _deepspeed() if which == "deepspeed" else _megatron()


SHORT = {"start": 1, "samples": 4, "ramp_end": 3, "noise_floor_correction": False}


def _deepspeed() -> dict[str, Any]:
    from tests.checkpoints import deepspeed_runs
    from tests.checkpoints.comparing import read

    settings, found = read("zero2-waiting", "settings.json"), {}
    section = settings["ds_config"]["mols"]
    sections = {
        "measured": {**section, **SHORT},
        "given": {**section, **SHORT, "fixed_alphas": {"mlp.0": 2.0}},
        "disabled": {**section, "enabled": False},
    }
    for name, changed in sections.items():
        settings["ds_config"]["mols"] = changed
        engine = deepspeed_runs.engine_of(settings)
        for iteration in range(6):
            deepspeed_runs.iterate(engine, settings, iteration)
        found[name] = {"handle": handle(engine.mols), "report": report_keys(engine.mols.report())}
        if name == "measured":
            written = json.loads(Path("report/mols_report.json").read_text("utf-8")) if _first() else None
            assert written is None or written == engine.mols.report()
        engine.destroy()
    return found


def _first() -> bool:
    return os.environ["RANK"] == "0"


def _megatron() -> dict[str, Any]:
    import megatron_patches
    from tests.checkpoints.comparing import read
    from tests.engines.megatron.building import Setup
    from tests.engines.megatron.running import Run

    settings, found = read("megatron-tp2-waiting", "settings.json"), {}
    with megatron_patches.cpu_megatron(fused_adam=True):
        section = {**settings["mols"], **SHORT}
        for name, changed in {"measured": section, "disabled": {**section, "enabled": False}}.items():
            with Run(Setup(**settings["setup"]), changed, "attach", **settings["optimizer"]) as run:
                run.train(0, 6)
                found[name] = {"handle": handle(run.mols), "report": report_keys(run.mols.report())}
    return found


def report_keys(report: Mapping[str, Any]) -> dict[str, Any]:
    """Type of every value of a report: at its top, in a group, in "world"; and the packages of "versions"."""
    groups = report.get("groups", {})
    rows: dict[str, set[str]] = {}
    for row in groups.values():
        for key, value in row.items():
            rows.setdefault(key, set()).add(type(value).__name__)
    return {
        "top": {key: type(value).__name__ for key, value in report.items()},
        "group": {key: sorted(types) for key, types in rows.items()},
        "world": {key: type(value).__name__ for key, value in report.get("world", {}).items()},
        "versions": sorted(report.get("versions", {})),
    }


# --- commands -------------------------------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # command: (how it is started, what, arguments before --help)
    "mols-ds": ("entry", "mols-ds", ()),
    "mols-ds launch": ("entry", "mols-ds", ("launch",)),
    "mols-ds doctor": ("entry", "mols-ds", ("doctor",)),
    "launch/deepspeed": ("path", "launch/deepspeed", ()),
    "deepspeed's own launcher": ("stock", "deepspeed", ()),
    "train.py": ("path", "train.py", ()),
    "finetune.py": ("path", "finetune.py", ()),
    "train_megatron.py": ("path", "train_megatron.py", ()),
    "python -m mols_ds.study": ("module", "mols_ds.study", ()),
    "python -m mols_ds.plan.simulate": ("module", "mols_ds.plan.simulate", ()),
    "python -m mols_ds.signals": ("module", "mols_ds.signals", ()),
    "python -m mols_ds.health": ("module", "mols_ds.health", ()),
    "python -m tests.fuzz": ("module", "tests.fuzz", ()),
    "python -m tests.faults": ("module", "tests.faults", ()),
    "benchmarks/overhead.py": ("path", "benchmarks/overhead.py", ()),
    "benchmarks/accumulator.py": ("path", "benchmarks/accumulator.py", ()),
    "benchmarks/scale.py": ("path", "benchmarks/scale.py", ()),
}
WITHOUT_OPTIONS = ("tests.apps.plan_measure",)  # documented as `python -m NAME`, and it works for minutes


def commands() -> dict[str, Any]:
    """Options, positionals, subcommands and help of every command."""
    results = run_cases(command, 1, [(name,) for name in COMMANDS])
    return {name: results[(name,)][0] for name in COMMANDS}


def command(name: str) -> dict[str, Any]:
    """On one rank: run a command with --help, and note every parser that it asks to parse."""
    way, what, arguments = COMMANDS[name]
    parsers: list[argparse.ArgumentParser] = []
    stock = argparse.ArgumentParser.parse_known_args

    def noted(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        parsers.append(self)
        return stock(self, *args, **kwargs)

    text, former = io.StringIO(), (sys.argv, sys.path[:])
    sys.argv, os.environ["COLUMNS"] = [what, *arguments, "--help"], "100"
    argparse.ArgumentParser.parse_known_args = noted  # type: ignore[method-assign,assignment]
    try:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            _start(way, what)
    finally:
        argparse.ArgumentParser.parse_known_args = stock  # type: ignore[method-assign]
        sys.argv, sys.path[:] = former
    found: dict[str, Any] = {"options": {}, "positionals": [], "subcommands": {}}
    for parser in parsers[:1]:  # the rest are its subcommands
        found = options_of(parser)
    return {**found, "help": text.getvalue().splitlines()}


def _start(way: str, what: str) -> None:
    if way == "entry":
        (point,) = importlib.metadata.entry_points(group="console_scripts", name=what)
        point.load()()
    elif way == "stock":
        importlib.import_module("deepspeed.launcher.runner").parse_args(sys.argv[1:])
    elif way == "module":
        runpy.run_module(what, run_name="__main__", alter_sys=False)
    else:
        sys.path.insert(0, str((ROOT / what).parent))  # as for `python PATH`
        runpy.run_path(str(ROOT / what), run_name="__main__")


def options_of(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The options (by every one of their strings), positionals and subcommands of a parser."""
    options: dict[str, Any] = {}
    positionals: list[dict[str, Any]] = []
    subcommands: dict[str, Any] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            subcommands |= {name: options_of(sub) for name, sub in action.choices.items()}
            continue
        about = {
            "nargs": action.nargs,
            "choices": None if action.choices is None else [str(choice) for choice in action.choices],
            "required": action.required,
        }
        if action.option_strings:
            options |= dict.fromkeys(action.option_strings, about)
        else:
            positionals.append({"name": action.dest, **about})
    return {"options": options, "positionals": positionals, "subcommands": subcommands}


def _engines() -> dict[str, Any]:
    results = run_cases(engines, WORLD, [("deepspeed",), ("megatron",)])
    return {which: results[(which,)][0] for which in ("deepspeed", "megatron")}


# --- metrics --------------------------------------------------------------------------------------------------------


def metrics() -> dict[str, Any]:
    """Key -> type in each kind of line of metrics.jsonl, of every program that writes one."""
    from tests.checkpoints.outcomes import FINETUNE, JOBS, job_outcomes

    results = job_outcomes()
    programs = {name.removeprefix("job-") + ".py": results[(name,)][0]["keys"] for name in JOBS}
    return {**programs, "finetune.py": results[(FINETUNE,)][0]}


SNAPSHOTS: dict[str, Callable[[], Any]] = {
    "names": names,
    "config": config,
    "commands": commands,
    "engines": _engines,
    "metrics": metrics,
}
