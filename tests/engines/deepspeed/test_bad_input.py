"""Mistakes and unsupported engines: one clear line on every rank, an unchanged engine, no hang."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

import mols_ds
from mols_ds.core.config import MolsConfig
from mols_ds.engines.deepspeed.checks import check_supported
from mols_ds.engines.deepspeed.compat import ENGINE_NAMES
from mols_ds.engines.deepspeed.shards import find_shards
from mols_ds.errors import MolsCheckpointError, MolsConfigError, MolsError, MolsUnsupportedError
from tests.engines.deepspeed.engines import config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.models import model_of
from tests.engines.deepspeed.state import snapshot
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

WORLD = 2
STOCK = deepspeed.initialize
STEPS = {"start": 1, "ramp_end": 20}

# ---------------------------------------------------------------------- refused before an engine is built

SECTIONS: list[tuple[Any, str]] = [
    ({"sampels": 8}, r'"mols.sampels": unknown key; did you mean "samples"'),
    ({"samples": "lots"}, r'"mols.samples"'),
    ({"start": 30, "ramp_end": 20}, r"start \(30\) is after ramp_end \(20\)"),
    ({"samples": 3}, r"too few for noise_floor_correction \(needs K >= 4\)"),
    ({"estimator": "best"}, r'"mols.estimator"'),
    ({"alpha_max": 0.1}, r'"mols.alpha_max"'),
    ({"fixed_alphas": {"qk": 0}}, r"fixed_alphas.qk: must be a finite number > 0"),
    ([], r'"mols": must be an object'),
    ("on", r'"mols": must be an object'),
]


@pytest.mark.parametrize(("section", "message"), SECTIONS, ids=[str(s)[:30] for s, _ in SECTIONS])
def test_wrong_sections_are_refused_first(section: Any, message: str, tmp_path: Path) -> None:
    """As a dict, as a file, and through the launcher's arguments: always before DeepSpeed touches the model."""
    given = {"train_micro_batch_size_per_gpu": 1, "mols": section}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(given))
    launched = SimpleNamespace(deepspeed_config=str(file), local_rank=0)
    for arguments in ({"config": given}, {"config": str(file)}, {"args": launched}, {"config_params": given}):
        with pytest.raises(MolsConfigError, match=message) as caught:
            mols_ds.initialize(model=nn.Linear(2, 2), **arguments)
        assert "\n" not in str(caught.value)


def test_missing_config_file() -> None:
    with pytest.raises(MolsConfigError, match=r"ds_nowhere.json: no such file"):
        mols_ds.initialize(model=nn.Linear(2, 2), config="ds_nowhere.json")


# ---------------------------------------------------------------------- refused by attach, on a real engine


class Nameless(nn.Module):
    """A weight matrix that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.mystery = model_of("plain"), nn.Linear(19, 7)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.inner(input_ids, labels)


# (model, section, message); each on every rank of one engine of that model.
ATTACHED: dict[str, tuple[str, dict[str, Any], str]] = {
    "rule matches nothing": ("llama", {**STEPS, "rules": [["no_such_layer", "mlp"]]}, r"no_such_layer"),
    "broken regex": ("llama", {**STEPS, "rules": [["(", "mlp"]]}, r"\("),
    "rule names no group": ("llama", {**STEPS, "rules": [["up_proj", "feed forward"]]}, r"feed forward.*allowed are"),
    "weight in no group": ("nameless", STEPS, r"mystery"),
    "reference group absent": ("gpt2", {**STEPS, "reference": "head"}, r'no group "head" in this model; groups: emb'),
    "reference misspelt": ("llama", {**STEPS, "reference": "qv"}, r'"mols.reference": no group "qv"'),
    "fixed alpha of no group": ("gpt2", {**STEPS, "fixed_alphas": {"head": 2.0}}, r'no group "head" in this model'),
    "fixed alpha of other": ("llama", {**STEPS, "fixed_alphas": {"other": 2.0}}, r"measured but never scaled"),
    "share without total": ("llama", {}, r'"mols.start": 0.01 is a share of all steps'),
    "ramp_end auto, no warm-up": ("llama", {"start": 1, "ramp_end": "auto"}, r'"auto" reads the scheduler'),
    "start past the end": ("llama", {"start": 90, "ramp_end": 95, "total_steps": 80}, r"past the last of 80 steps"),
    "share after ramp": ("llama", {"start": 15, "ramp_end": 0.1, "total_steps": 80}, r"step 15 is after"),
    "moments without Adam": ("sgd", {**STEPS, "mode": "moments"}, r'mode "moments" with SGD'),
    "lr of None": ("no lr", STEPS, r"lr is None"),
    "unknown key": ("llama", {**STEPS, "stop": 3}, r'"mols.stop": unknown key'),
}


def engine_named(name: str) -> Any:
    model: nn.Module = Nameless() if name == "nameless" else model_of("llama" if name in ("sgd", "no lr") else name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if name == "sgd" else None
    return engine_of(config(2, micros=1), model, optimizer, initialize=STOCK)


def hooks_of(engine: Any) -> tuple[int, ...]:
    inner = find_shards(engine).inner
    patched = sum(name in vars(engine) for name in ("_take_model_step", "save_checkpoint", "load_checkpoint"))
    return len(inner._optimizer_step_pre_hooks), len(inner._optimizer_step_post_hooks), patched


def refuse(model: str) -> dict[str, Any]:
    """All of ATTACHED for one model, on one engine, which then trains on as if nothing had been tried."""
    prints: list[dict[str, str]] = []
    said: dict[str, Any] = {}
    for attempt in (False, True):
        torch.manual_seed(0)
        engine = engine_named(model)
        before = hooks_of(engine)
        for name, (wanted, section, _) in ATTACHED.items() if attempt else ():
            if wanted != model:
                continue
            group = find_shards(engine).inner.param_groups[0]
            kept, group["lr"] = group["lr"], None if model == "no lr" else group["lr"]
            try:
                mols_ds.attach(engine, section).detach()
                said[name] = ("nothing", "")
            except MolsError as error:
                said[name] = (type(error).__name__, str(error))
            group["lr"] = kept
        assert hooks_of(engine) == before and not hasattr(engine, "mols")
        for step in range(2):
            iterate(engine, step, 1)
        prints.append(snapshot(engine))
        engine.destroy()
    return {"said": said, "same": prints[0] == prints[1]}


# ---------------------------------------------------------------------- engines that are refused by name


class OneBitAdam(torch.optim.AdamW):
    """Stands in for DeepSpeed's (which needs MPI or NCCL): refused by its name."""


class StrangeWrapper:
    """An optimizer wrapper of a DeepSpeed to come."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def muon() -> Any:
    section = {"type": "Muon", "params": {"lr": 1e-3, "torch_adam": True}}
    return engine_of(config(2, micros=1, optimizer=section, zero={"reduce_scatter": False}), initialize=STOCK)


def one_bit() -> Any:
    model = model_of()
    return engine_of(config(0, micros=1), model, OneBitAdam(model.parameters()), initialize=STOCK)


def rprop() -> Any:
    model = model_of()
    return engine_of(config(1, micros=1), model, torch.optim.Rprop(model.parameters()), initialize=STOCK)


def strange_wrapper() -> Any:
    engine = engine_of(config(2, micros=1), initialize=STOCK)
    engine.optimizer = StrangeWrapper(engine.optimizer.optimizer)
    return engine


def no_optimizer() -> Any:
    model = model_of()
    return deepspeed.initialize(model=model, config=config(0, micros=1))[0]


ENGINES: dict[str, tuple[Callable[[], Any], str]] = {
    "Muon": (muon, r"Muon under DeepSpeed .*use Adam or AdamW"),
    "1-bit": (one_bit, r"OneBitAdam .*use Adam or AdamW"),
    "Rprop": (rprop, r"Rprop \(its step is not proportional to lr\)"),
    "unknown wrapper": (strange_wrapper, r"optimizer wrapper StrangeWrapper is not supported; supported are"),
    "no optimizer": (no_optimizer, r"an engine without an optimizer: pass one"),
}


def refuse_engine(name: str) -> tuple[str, str]:
    engine = ENGINES[name][0]()
    try:
        mols_ds.attach(engine, STEPS)
    except MolsError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def handle() -> dict[str, Any]:
    """Attaching twice, late and with an unwritable report folder; a key of client_state that is taken; detaching."""
    seen: dict[str, Any] = {}
    engine = engine_of(config(2, micros=1), initialize=STOCK)
    stock = hooks_of(engine)
    mols_ds.attach(engine, {**STEPS, "mode": "online", "samples": 4})
    attached = hooks_of(engine)
    for name, action in {
        "twice": lambda: mols_ds.attach(engine, STEPS),
        "client_state": lambda: engine.save_checkpoint("ckpt", client_state={"mols": 1}),
    }.items():
        try:
            action()
        except MolsError as error:
            seen[name] = (type(error).__name__, str(error))
    for step in range(3):
        iterate(engine, step, 1)
    assert engine.mols.accumulator_bytes > 0
    engine.mols.detach()
    seen["after detach"] = (stock, attached, hooks_of(engine), hasattr(engine, "mols"))
    iterate(engine, 3, 1)
    Path("taken").write_text("a file, not a folder")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # The step of "start" is past, and the report cannot be written.
        again = mols_ds.attach(engine, {**STEPS, "mode": "online", "samples": 4, "report_dir": "taken"})
        for step in range(6):
            iterate(engine, 4 + step, 1)
    seen["late"] = (again is engine.mols, engine.mols.phase, engine.mols.samples, engine.mols.report()["step"])
    seen["warnings"] = [str(w.message) for w in caught]
    engine.destroy()
    return seen


def without_norm(mode: str) -> tuple[str, str]:
    """compute_grad_norm=false leaves nothing to undo clipping by."""
    section = {**STEPS, "mode": mode, "samples": 4}
    settings = config(2, mols=section, zero={"compute_grad_norm": False}, micros=1, gradient_clipping=0.0)
    try:
        engine = engine_of(settings)
        for step in range(6):
            iterate(engine, step, 1)
    except MolsError as error:
        return type(error).__name__, str(error)
    return "nothing", repr(engine.mols.phase)


def one(kind: str, *rest: str) -> Any:
    actions: dict[str, Callable[..., Any]] = {
        "refuse": refuse,
        "engine": refuse_engine,
        "handle": handle,
        "norm": without_norm,
    }
    return actions[kind](*rest)


MODELS = tuple(dict.fromkeys(model for model, _, _ in ATTACHED.values()))
CASES: Cases[tuple[str, ...]] = Cases(
    [
        *(("refuse", model) for model in MODELS),
        *(("handle",), ("norm", "online"), ("norm", "probe")),
        *(("engine", name) for name in ENGINES),
    ],
    quick=[("refuse", "llama"), ("handle",), ("engine", "no optimizer")],
)


@functools.cache
def runs() -> Results:
    return run_cases(one, WORLD, CASES.wanted, timeout=60)


@pytest.mark.distributed
@CASES.parametrize("name", ATTACHED, reads=lambda name: [("refuse", ATTACHED[name][0])])
def test_attach_refuses_in_one_line_on_every_rank(name: str) -> None:
    model, _, message = ATTACHED[name]
    first, *others = runs()["refuse", model]
    kind, text = first["said"][name]
    assert kind in ("MolsConfigError", "MolsUnsupportedError")
    with pytest.raises(MolsError, match=message):
        raise MolsError(text)
    assert "\n" not in text
    assert all(other["said"][name] == (kind, text) for other in others)  # the same on all ranks: no rank waits


@pytest.mark.distributed
@CASES.parametrize("model", MODELS, reads=lambda model: [("refuse", model)])
def test_a_refused_engine_trains_on_as_stock(model: str) -> None:
    assert all(seen["same"] for seen in runs()["refuse", model])


@pytest.mark.distributed
@CASES.parametrize("name", ENGINES, reads=lambda name: [("engine", name)])
def test_engines_that_are_refused_by_name(name: str) -> None:
    for kind, text in runs()["engine", name]:
        assert kind == "MolsUnsupportedError" and "\n" not in text
        with pytest.raises(MolsError, match=ENGINES[name][1]):
            raise MolsError(text)


def fake_engine(outer: Any, **attributes: Any) -> Any:
    """Just enough of an engine for check_supported; the real ones need long builds or other hardware."""
    outer.optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    return SimpleNamespace(
        optimizer=outer,
        config={},
        module=nn.Module(),
        managed_gradient_accumulation=lambda: True,
        **(dict.fromkeys(set(ENGINE_NAMES) - {"optimizer", "module", "managed_gradient_accumulation"}, 0) | attributes),
    )


def test_zenflow_superoffload_and_partial_offload_are_refused_by_name() -> None:
    from deepspeed.runtime.superoffload.superoffload_stage3 import SuperOffloadOptimizer_Stage3
    from deepspeed.runtime.zenflow.zenflow_stage_1_and_2 import ZenFlowZeroOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    section = MolsConfig.parse(STEPS)
    plain = type("DeepSpeedZeroOptimizer", (), {})()
    check_supported(fake_engine(plain), section)  # precondition: the fake itself is fine
    partial = object.__new__(DeepSpeedZeroOptimizer_Stage3)
    partial.partial_offload = 0.5
    cases = [
        (fake_engine(plain, zenflow=True), r"ZenFlow .*remove \"zero_optimization.zenflow\""),
        (fake_engine(object.__new__(ZenFlowZeroOptimizer)), r"ZenFlow"),
        (fake_engine(object.__new__(SuperOffloadOptimizer_Stage3)), r"SuperOffload .*super_offload\": false"),
        # DeepSpeed asserts its own CPU Adam for a ratio below 1, which is a build of minutes.
        (fake_engine(partial), r"offload_optimizer.ratio < 1 .*set \"offload_optimizer.ratio\": 1.0"),
        (fake_engine(plain, has_moe_layers=True), r"expert parallelism"),
    ]
    for engine, message in cases:
        with pytest.raises(MolsUnsupportedError, match=message):
            check_supported(engine, section)


@pytest.mark.distributed
@CASES.reads(("handle",))
def test_attaching_twice_late_and_detaching() -> None:
    for rank, seen in enumerate(runs()["handle",]):
        assert seen["twice"][0] == "MolsError" and "detach()" in seen["twice"][1]
        assert seen["client_state"][0] == MolsCheckpointError.__name__ and "another key" in seen["client_state"][1]
        stock, attached, hooks, left = seen["after detach"]
        assert hooks == stock and not left and all(a > b for a, b in zip(attached, stock, strict=True))
        assert seen["late"] == (True, "ramping", 4, 8)
        said = " ".join(seen["warnings"])
        if rank == 0:
            assert "step 4 is past mols.start (step 1): the calibration begins now" in said
            assert "the report could not be written" in said


@pytest.mark.distributed
@CASES.reads(("norm", "online"), ("norm", "probe"))
def test_no_gradient_norm() -> None:
    """Online needs it; a probe reads the gradients before any clipping."""
    for kind, text in runs()["norm", "online"]:
        assert kind == "MolsUnsupportedError" and "compute_grad_norm" in text and '"mode": "probe"' in text
    assert all(kind == "nothing" for kind, _ in runs()["norm", "probe"])
