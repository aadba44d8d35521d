"""`mols_ds.patch()`: a call of `deepspeed.initialize` with a "mols" section gets MoLS, any other the stock engine."""

from __future__ import annotations

import base64
import contextlib
import functools
import inspect
import io
import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

import mols_ds
from mols_ds.engines.deepspeed.compat import INITIALIZE
from tests.engines.deepspeed.engines import config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.models import model_of
from tests.engines.deepspeed.state import snapshot
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

STOCK = deepspeed.initialize
SECTION = {"start": 1, "samples": 4, "ramp_end": 8, "report_dir": "report"}
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
Log = list[str]


@contextlib.contextmanager
def put_back() -> Iterator[None]:
    """Whatever was done to `deepspeed.initialize` inside is undone."""
    try:
        yield
    finally:
        mols_ds.unpatch()
        deepspeed.initialize = STOCK


def settings(**more: Any) -> dict[str, Any]:
    return config(2, SECTION, micros=1, optimizer=ADAMW, **more)


def phase(call: Callable[[], Any]) -> str:
    """Phase of the engine that `call` builds; "stock" without MoLS."""
    engine = call()[0]
    found = engine.mols.phase if hasattr(engine, "mols") else "stock"
    engine.destroy()
    return str(found)


def build(given: Any = None, **arguments: Any) -> Any:
    model = model_of()
    named = {} if given is None and "args" in arguments else {"config": settings() if given is None else given}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), **named, **arguments)


def wrapper(name: str, log: Log) -> Callable[..., Any]:
    """A replacement of the current function, as in ms-swift: takes any arguments and records its calls."""
    below = deepspeed.initialize

    def initialize(*args: Any, **kwargs: Any) -> Any:
        log.append(name)
        return below(*args, **kwargs)

    deepspeed.initialize = initialize
    return initialize


# ---------------------------------------------------------------------- who is called


def chain() -> dict[str, Any]:
    """Each entry: what an engine is then, and who else was called for it."""
    seen: dict[str, Any] = {}

    def note(name: str) -> None:
        log.clear()
        seen[name] = (phase(build), list(log))

    log: Log = []
    with put_back():
        note("stock")
        mols_ds.patch()
        note("patched")
        mols_ds.patch()
        note("twice")
        mols_ds.unpatch()
        seen["undone once"] = deepspeed.initialize is STOCK
    with put_back():
        before = wrapper("before", log)
        mols_ds.patch()
        note("over another")
        wrapper("after", log)
        note("between two")
        mols_ds.patch()
        note("between two, again")
        mols_ds.unpatch()
        note("undone below another")
        mols_ds.patch()
        note("and once more")
        mols_ds.unpatch()
        seen["other one left"] = deepspeed.initialize is not before
    with put_back():
        mols_ds.patch()
        deepspeed.initialize = STOCK  # undoes a replacement from before ours
        mols_ds.patch()
        note("lost and patched")
    with put_back():
        deepspeed.initialize = mols_ds.initialize
        note("assigned")
        wrapper("after", log)
        note("assigned, below another")
        mols_ds.patch()
        note("assigned and patched")
    return seen


def forms() -> dict[str, Any]:
    """A config in every form that DeepSpeed takes, through `mols_ds.initialize` and the patched function."""
    text = json.dumps(settings())
    commented = "{\n  # a comment of HJSON\n" + text[1:-1] + ",\n}"
    Path("ds.json").write_text(text, "utf-8")
    Path("ds.hjson").write_text(commented, "utf-8")
    coded = base64.urlsafe_b64encode(commented.encode()).decode()
    assert len(coded) > 255  # longer than the name of a file may be
    given: dict[str, dict[str, Any]] = {
        "dict": {"given": settings()},
        "file": {"given": "ds.json"},
        "hjson": {"given": "ds.hjson"},
        "base64": {"given": coded},
        "args": {"args": Namespace(deepspeed_config="ds.hjson", local_rank=0)},
        "args base64": {"args": Namespace(deepspeed_config=coded, local_rank=0)},
    }
    seen: dict[str, Any] = {}
    for way in ("patched", "assigned"):
        with put_back():
            mols_ds.patch() if way == "patched" else setattr(deepspeed, "initialize", mols_ds.initialize)
            for name, arguments in given.items():
                seen[f"{way} {name}"] = phase(lambda arguments=arguments: build(**arguments))
            model = model_of()
            positional = (None, model, None, list(model.parameters()), *(None,) * 2, 29500, *(None,) * 3, settings())
            seen[f"{way} positional"] = phase(lambda given=positional: deepspeed.initialize(*given))
            wrapper("after", [])
            mols_ds.patch()
            seen[f"{way} positional, over a function without names"] = phase(
                lambda given=positional: deepspeed.initialize(*given)
            )
    return seen


def wrong_file() -> dict[str, str]:
    """Without a config that can be read, the patched function raises what DeepSpeed does."""
    seen = {}
    for name in ("stock", "patched"):
        with put_back():
            if name == "patched":
                mols_ds.patch()
            with pytest.raises(ValueError) as raised:
                build("none.json")
            seen[name] = str(raised.value)
    return seen


def reference_model() -> dict[str, Any]:
    """An engine that trains nothing (the reference model of DPO) shares the config of the one that trains."""
    said = io.StringIO()
    shared = {k: v for k, v in settings().items() if k not in ("optimizer", "zero_optimization")}
    with put_back(), contextlib.redirect_stdout(said):
        mols_ds.patch()
        found = phase(lambda: deepspeed.initialize(model=model_of(), config=shared))
    return {"phase": found, "said": said.getvalue()}


def unreached() -> dict[str, Any]:
    """Engines that are built past the patched function; what becomes of each."""
    seen: dict[str, Any] = {}

    def note(name: str, initialize: Callable[..., Any], section: Any = SECTION) -> None:
        model = model_of()
        given = config(2, section, micros=1, optimizer=ADAMW)
        try:
            seen[name] = phase(lambda: initialize(model=model, model_parameters=model.parameters(), config=given))
        except mols_ds.MolsError as error:
            seen[name] = str(error)

    with put_back():
        mols_ds.patch()
        note("imported before", STOCK)
        note("no section", STOCK, None)
        note("off", STOCK, {"enabled": False})
        note("ours", mols_ds.initialize)
        mols_ds.unpatch()
        note("undone", STOCK)
        seen["class put back"] = "below_mols" not in vars(deepspeed.DeepSpeedEngine.__init__)
    with put_back():  # ms-swift: it wraps what is there at ZeRO-3, moves its hook behind DeepSpeed's, and puts it back
        swift, log = deepspeed.initialize, []
        wrapper("swift", log)
        mols_ds.patch()
        note("below ours", deepspeed.initialize)
        deepspeed.initialize = swift
        note("swift put its own back", deepspeed.initialize)
        seen["swift was called"] = log
    return seen


def _move_hook_last(model: Any, key: int) -> None:
    below = deepspeed.initialize

    @functools.wraps(below)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        built = below(*args, **kwargs)
        model._forward_pre_hooks.move_to_end(key)
        return built

    deepspeed.initialize = initialize


def swift_hook() -> dict[str, Any]:
    """ms-swift's pre-hook of the model, which its replacement moves behind DeepSpeed's: patched before it and after."""
    seen = {}
    for order in ("before", "after"):
        with put_back():
            torch.manual_seed(3)
            model, calls = model_of(), []
            handle = model.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
            if order == "before":
                mols_ds.patch()
            _move_hook_last(model, handle.id)
            if order == "after":
                mols_ds.patch()
            given = config(3, SECTION, micros=1, optimizer=ADAMW)
            engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=given)[0]
            for step in range(10):
                iterate(engine, step, 1)
            alphas = engine.mols.alphas
            seen[order] = (engine.mols.phase, alphas, len(calls), len(set(alphas.values())) > 2)
            engine.destroy()
    return seen


def same_bits() -> dict[str, Any]:
    """Without a section, with one that is off, and stock: all that training depends on, after three updates."""
    seen = {}
    for name, section in (("stock", None), ("no section", None), ("off", {"enabled": False})):
        with put_back():
            if name != "stock":
                mols_ds.patch()
            torch.manual_seed(3)
            engine = engine_of(config(2, section, micros=2), initialize=deepspeed.initialize)
            for step in range(3):
                iterate(engine, step)
            seen[name] = (snapshot(engine), hasattr(engine, "mols"))
            engine.destroy()
    return seen


WORK = {f.__name__: f for f in (chain, forms, wrong_file, reference_model, unreached, swift_hook, same_bits)}
CASES = Cases(WORK, quick=["chain", "forms", "same_bits"])


def one(name: str) -> Any:
    return WORK[name]()


@functools.cache
def results() -> Results:
    return run_cases(one, 1, [(name,) for name in CASES.wanted])


@CASES.reads("chain")
def test_it_nests_and_is_undone() -> None:
    (seen,) = results()["chain",]
    assert seen == {
        "stock": ("stock", []),
        "patched": ("waiting", []),
        "twice": ("waiting", []),
        "undone once": True,
        "over another": ("waiting", ["before"]),
        "between two": ("waiting", ["after", "before"]),
        "between two, again": ("waiting", ["after", "before"]),
        "undone below another": ("stock", ["after", "before"]),
        "and once more": ("waiting", ["after", "before"]),
        "other one left": True,
        "lost and patched": ("waiting", []),
        "assigned": ("waiting", []),
        "assigned, below another": ("waiting", ["after"]),
        "assigned and patched": ("waiting", ["after"]),
    }


@CASES.reads("forms")
def test_configs_are_read_as_deepspeed_reads_them() -> None:
    (seen,) = results()["forms",]
    assert set(seen.values()) == {"waiting"}, seen
    assert len(seen) == 16


@CASES.reads("wrong_file")
def test_a_config_that_cannot_be_read_is_deepspeed_s_to_refuse() -> None:
    (seen,) = results()["wrong_file",]
    assert seen["patched"] == seen["stock"]


@CASES.reads("reference_model")
def test_an_engine_without_an_optimizer_is_left_alone_and_that_is_said() -> None:
    (seen,) = results()["reference_model",]
    assert seen["phase"] == "stock"
    assert '"mols" section is left out for an engine without an optimizer' in seen["said"]


@CASES.reads("unreached")
def test_an_engine_that_the_patch_does_not_reach_is_refused() -> None:
    (seen,) = results()["unreached",]
    refused = 'the "mols" section would be left out: this engine is not built by the deepspeed.initialize of'
    assert seen["imported before"].startswith(refused) and seen["swift put its own back"].startswith(refused)
    assert (seen["no section"], seen["off"], seen["undone"]) == ("stock",) * 3
    assert seen["ours"] == seen["below ours"] == "waiting"
    assert seen["class put back"] and seen["swift was called"] == ["swift"]


@CASES.reads("swift_hook")
def test_a_replacement_that_orders_the_model_s_hooks() -> None:
    (seen,) = results()["swift_hook",]
    assert seen["before"] == seen["after"]
    assert seen["before"][0] == "ramping" and seen["before"][2:] == (10, True)


@CASES.reads("same_bits")
def test_without_a_section_it_is_bit_for_bit_stock() -> None:
    (seen,) = results()["same_bits",]
    assert seen["no section"] == seen["stock"]
    assert seen["off"][0] == seen["stock"][0]
    assert [has for _, has in seen.values()] == [False, False, True]


def test_the_arguments_of_deepspeed_s_function() -> None:
    assert tuple(inspect.signature(STOCK).parameters) == INITIALIZE
