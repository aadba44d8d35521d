"""`megatron_patches.apply()`: a script that knows nothing of MoLS trains as with `attach()`; `undo()` restores all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_patches.cpu.emulation import cpu_megatron
from mols_ds.errors import MolsError
from tests.engines.megatron import building
from tests.engines.megatron.building import Setup
from tests.engines.megatron.running import SECTION, Run
from tests.helpers.digests import differing
from tests.helpers.harness import Results, run_cases
from tests.helpers.tiers import Cases

WORLD, ITERATIONS = 2, 14


def script(setup: Setup) -> dict[str, Any]:
    """The same run through `apply()`, with its functions imported by name before, and through `attach()`."""
    with cpu_megatron(fused_adam=True):
        from megatron.core import optimizer
        from megatron.core.optimizer import get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        with Run(setup, way="apply") as run:
            by_name = optimizer.get_megatron_optimizer is get_megatron_optimizer
            by_name &= type(run.scheduler) is OptimizerParamScheduler
            run.train(0, ITERATIONS)
            applied = run.fingerprint()
        with Run(setup, way="attach") as run:
            run.train(0, ITERATIONS)
            attached = run.fingerprint()
    return {"by name": by_name, "differing": differing(applied, attached), "phase": applied["mols"][0]}


def places() -> dict[str, Any]:
    """All attributes of the modules and classes that `apply()` patches."""
    from megatron.core import dist_checkpointing, optimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    owners = (dist_checkpointing, optimizer, ChainedOptimizer, OptimizerParamScheduler)
    return {f"{owner.__name__}.{name}": value for owner in owners for name, value in vars(owner).items()}


def undone() -> dict[str, Any]:
    import megatron_patches

    with cpu_megatron():
        before = places()
        with Run(Setup(), way="apply") as run:
            during = places()
            run.train(0, 3)
        after = places()
        steps = [megatron_patches.current().steps]  # type: ignore[union-attr]
        run.iterate(3)
        current = megatron_patches.current()
        again = current.steps == steps[0] + (0 if run.mols.samples else 1)  # type: ignore[union-attr]
        current.detach()
        own = sorted(set(vars(run.optimizer)) & {"step", "get_grad_norm", "mols", "sharded_state_dict", "state_dict"})
    return {
        "changed": sorted(name for name in before if during[name] is not before[name]),
        "left": sorted(name for name in before.keys() | after.keys() if after.get(name) is not before.get(name)),
        "stays attached": again,
        "after detach": own,
    }


def optimizer_alone(setup: Setup) -> tuple[Any, Any]:
    """(built, optimizer) of a script that has no OptimizerParamScheduler."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    building.start(setup)
    built = building.build(setup)
    config = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=setup.distributed)
    optimizer = get_megatron_optimizer(config, built.chunks)
    optimizer.reload_model_params()
    return built, optimizer


def no_scheduler() -> dict[str, Any]:
    import megatron_patches

    found: dict[str, Any] = {}
    with cpu_megatron():
        megatron_patches.apply({**SECTION, "mode": "online"})
        try:
            built, optimizer = optimizer_alone(Setup())
            found["before"] = error_of(megatron_patches.current)
            building.step(built, optimizer, None, 0)
            mols: Any = megatron_patches.current()
            found["first"] = (mols.steps, mols.phase, optimizer.mols is mols)
            for iteration in range(1, 7):
                building.step(built, optimizer, None, iteration)
            found["later"] = (mols.steps, mols.phase)
        finally:
            megatron_patches.undo()
        megatron_patches.apply({})  # shares of an unknown number of steps
        try:
            built, optimizer = optimizer_alone(Setup())
            found["shares"] = error_of(lambda: building.step(built, optimizer, None, 0))
            found["again"] = error_of(lambda: building.step(built, optimizer, None, 0))
        finally:
            megatron_patches.undo()
    return found


def two_in_a_row() -> dict[str, Any]:
    import megatron_patches

    with cpu_megatron():
        setup = Setup()
        with Run(setup, way="apply") as run:
            run.train(0, 3)
            first = megatron_patches.current()
            built = building.build(setup)
            optimizer, scheduler = building.optimizer(built)
            second: Any = megatron_patches.current()
            for iteration in range(2):
                building.step(built, optimizer, scheduler, iteration)
            run.iterate(3)
            return {
                "apart": first is run.mols and second is not first and optimizer.mols is second,
                "counts": (run.mols.steps, run.mols.samples, second.steps, second.samples),
            }


def error_of(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except MolsError as error:
        return type(error).__name__, str(error)
    return "", "no error"


def refused() -> dict[str, tuple[str, str]]:
    import megatron_patches

    found = {}
    with cpu_megatron():
        import megatron.core as core

        found["undo before apply"] = error_of(megatron_patches.undo)
        found["section"] = error_of(lambda: megatron_patches.apply({"sampels": 3}))
        with Run(Setup(), way="apply"):
            found["twice"] = error_of(lambda: megatron_patches.apply(SECTION))
        with Run(Setup(), way="stock") as run:
            found["late"] = error_of(lambda: megatron_patches.apply(SECTION))
            version, core.__version__ = core.__version__, "0.99.1"
            try:
                found["version, apply"] = error_of(lambda: megatron_patches.apply(SECTION))
                found["version, attach"] = error_of(
                    lambda: megatron_patches.attach(run.built.chunks, run.optimizer, run.scheduler, SECTION)
                )
                mols = megatron_patches.attach(run.built.chunks, run.optimizer, None, SECTION, force=True)
                found["forced"] = ("", mols.phase)
                mols.detach()
            finally:
                core.__version__ = version
            mols = megatron_patches.attach(run.built.chunks, run.optimizer, None, {**SECTION, "enabled": False})
            found["disabled"] = ("", mols.phase)
    return found


def disabled() -> list[str]:
    """`"enabled": false` against stock."""
    with cpu_megatron():
        with Run(Setup(tp=2), {"enabled": False}, way="apply") as run:
            assert run.mols.phase == "disabled"
            run.train(0, 4)
            run.mols = None
            off = run.fingerprint()
        with Run(Setup(tp=2), way="stock") as run:
            run.train(0, 4)
            return differing(off, run.fingerprint())


def other_load() -> str:
    """A folder that is no checkpoint is Megatron's to complain about."""
    import os

    from tests.engines.megatron.checkpoints import load

    with cpu_megatron(fused_adam=True):
        os.makedirs("empty", exist_ok=True)
        with Run(Setup(), way="apply") as run:
            try:
                load(run.built, run.optimizer, run.scheduler, "empty", "fully_reshardable")
            except Exception as error:
                return type(error).__name__
    return ""


CASES: dict[str, Callable[[], Any]] = {
    "TP2": functools.partial(script, Setup(tp=2)),
    "EP2, plain": functools.partial(script, Setup(experts=4, ep=2, distributed=False)),
    "PP2 interleaved": functools.partial(script, Setup(pp=2, vp=2, layers=4)),
    "undone": undone,
    "no scheduler": no_scheduler,
    "two in a row": two_in_a_row,
    "disabled": disabled,
    "other load": other_load,
    "refused": refused,
}

NAMES = Cases(CASES, quick=["TP2", "undone", "refused"])


def case(name: str) -> Any:
    return CASES[name]()


@functools.cache
def outcomes() -> Results:
    return run_cases(case, WORLD, [(name,) for name in NAMES.wanted], timeout=60)


@NAMES.parametrize("name", ["TP2", "EP2, plain", "PP2 interleaved"])
def test_a_script_trains_as_with_attach(name: str) -> None:
    for found in outcomes()[name,]:
        assert found == {"by name": True, "differing": [], "phase": "fixed"}


@NAMES.reads("undone")
def test_undo_restores_every_attribute_and_leaves_the_optimizer_attached() -> None:
    for found in outcomes()["undone",]:
        assert found["changed"] == [
            "ChainedOptimizer.__init__",
            "ChainedOptimizer.load_state_dict",
            "ChainedOptimizer.sharded_state_dict",
            "ChainedOptimizer.step",
            "OptimizerParamScheduler.__init__",
            "megatron.core.dist_checkpointing.load",
            "megatron.core.optimizer._get_param_groups",
        ]
        assert found["left"] == [] and found["stays attached"] and found["after detach"] == []


@NAMES.reads("no scheduler")
def test_a_script_without_a_scheduler_attaches_at_its_first_step() -> None:
    for found in outcomes()["no scheduler",]:
        assert found["before"][0] == "MolsConfigError" and "no optimizer has been attached" in found["before"][1]
        assert found["first"] == (1, "waiting", True)
        assert found["later"] == (7, "ramping")
        assert "mols.total_steps" in found["shares"][1] and found["again"] == found["shares"]


@NAMES.reads("two in a row")
def test_each_optimizer_gets_its_own() -> None:
    for found in outcomes()["two in a row",]:
        assert found["apart"] and found["counts"] == (2, 2, 2, 0)


@NAMES.reads("disabled")
def test_disabled_is_stock_bit_for_bit() -> None:
    for found in outcomes()["disabled",]:
        assert found == []


@NAMES.reads("other load")
def test_a_load_of_something_else_keeps_megatrons_own_error() -> None:
    for found in outcomes()["other load",]:
        assert found == "CheckpointingException"


@NAMES.reads("refused")
def test_misuse_is_refused() -> None:
    for found in outcomes()["refused",]:
        assert "apply() was not called" in found["undo before apply"][1]
        assert found["section"] == ("MolsConfigError", found["section"][1]) and '"samples"' in found["section"][1]
        assert "was called already" in found["twice"][1]
        assert "was called too late" in found["late"][1] and "attach" in found["late"][1]
        for way in ("version, apply", "version, attach"):
            kind, text = found[way]
            assert kind == "MolsUnsupportedError" and "0.99.1" in text and "0.15 to 0.19" in text and "force" in text
        assert found["forced"][1] == "waiting" and found["disabled"][1] == "disabled"
