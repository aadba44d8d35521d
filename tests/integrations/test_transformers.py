"""The Trainer beside the table: DeepSpeed's own optimizer and scheduler, "auto", `recalibrate`, where the section may
be, `mols_ds.patch()`, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import mols_ds
from mols_ds.integrations.transformers import MolsCallback
from tests.integrations.places import counts as check_counts
from tests.integrations.places import logs as check_logs
from tests.integrations.runner import Case, results, table
from tests.integrations.runs import CLAMPED, ONLINE, RAMP_END, SAMPLES, START
from tests.integrations.trainers import Spec, Watch, make, train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(3600)]

HERE = "test_transformers"
COUNTS: dict[str, Spec] = {
    "optimizer and scheduler of DeepSpeed": Spec(ds="deepspeed"),
    "auto": Spec(mols={"total_steps": "auto", "ramp_end": "auto", "start": 0, "samples": SAMPLES}, micros=2),
    "a sampler of the user's": Spec(micros=2, own_sampler=True),
    "calibrates again": Spec(stage=3, mols={"recalibrate": {"every": 4}}),
}


def counts(name: str) -> dict[str, Any]:
    """The stock run; one whose alphas are all clamped to 1; and one as it is meant."""
    spec = COUNTS[name]
    stock = train(replace(spec, how="stock", mols=None, out="stock"))
    clamped = train(replace(spec, mols={**(spec.mols or {}), **CLAMPED}, out="clamped"))
    return {"stock": stock, "clamped": clamped, "real": train(replace(spec, out="real"))}


def ways() -> dict[str, Any]:
    """The section as an argument; `patch` alone, in a mode that takes every step; both of them."""
    found = {"config": train(Spec()), "argument": train(Spec(argument=True, out="argument"))}
    online = {**ONLINE, "total_steps": 14}
    found["patch"] = train(Spec(how="patch", mols=online, out="patch"))
    found["callback online"] = train(Spec(mols=online, out="callback"))
    mols_ds.patch()
    found["patch and callback"] = train(Spec(out="both"))
    return found


def refusals() -> dict[str, str]:
    found = {}

    def note(name: str, spec: Spec, callback: MolsCallback, bind: bool = True) -> None:
        watch = Watch()
        watch.trainer = trainer = make(spec, watch, callback)
        try:
            if bind:
                callback.bind(trainer)
            trainer.train()
            found[name] = "trained"
        except mols_ds.MolsError as error:
            found[name] = f"{type(error).__name__}: {error}"

    note("unbound", Spec(), MolsCallback(), bind=False)
    note("no section", Spec(mols=None), MolsCallback())
    note("two sections", Spec(), MolsCallback({"start": 3}))
    note("wrong key", Spec(mols={"sampels": 3}), MolsCallback())
    note("off", Spec(mols={"enabled": False}), MolsCallback())
    first = MolsCallback()
    first.bind(make(Spec(), Watch(), first))
    note("two trainers", Spec(), first)
    note("bound late", Spec(), BoundLate())
    return found


class BoundLate(MolsCallback):
    """Is bound when the Trainer has built its engine already."""

    def bind(self, trainer: Any) -> MolsCallback:
        self.late = trainer
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().bind(self.late)
        super().on_train_begin(args, state, control, **kwargs)


COUNTED: list[Case] = [(world, f"{HERE}:counts", name) for world in (1, 2) for name in COUNTS]
WAYS: Case = (1, f"{HERE}:ways")
REFUSALS: Case = (1, f"{HERE}:refusals")
CASES = table(
    [*COUNTED, WAYS, REFUSALS], full=[case for case in COUNTED if case[0] == 2 or case[2] == "calibrates again"]
)


@CASES.parametrize(("world", "function", "name"), COUNTED, reads=lambda case: [case])
def test_counts_and_logs_are_those_of_the_stock_run(world: int, function: str, name: str) -> None:
    for seen in results(world)[function, name]:
        if name == "calibrates again":  # more than once
            for how in ("clamped", "real"):
                seen[how]["samples"] = SAMPLES
        check_counts(seen)
        assert seen["clamped"]["lrs"] == seen["stock"]["lrs"]
        if COUNTS[name].ds == "deepspeed":  # it has stepped its scheduler when the Trainer looks at the rate
            rows = seen["real"]["logs"]
            for row, before in zip(rows, [0.0, *(row["lr"] for row in rows)], strict=False):
                row["lr"] = before
        if name != "calibrates again":
            check_logs(seen)
        read, extra = seen["stock"]["read"], iter(seen["clamped"]["read"])  # extra batches are read between them
        assert all(index in extra for index in read) and len(seen["clamped"]["read"]) > len(read)


@CASES.reads(WAYS)
def test_the_section_comes_from_the_config_or_an_argument_and_patch_serves_as_well() -> None:
    (seen,) = results(1)[WAYS[1:]]
    assert seen["argument"]["weights"] == seen["config"]["weights"]
    assert seen["patch and callback"]["weights"] == seen["config"]["weights"]
    assert seen["patch"]["weights"] == seen["callback online"]["weights"]
    assert len(set(seen["patch"]["alphas"].values())) > 2
    assert seen["config"]["phases"][START - 1 : RAMP_END] == [
        "calibrating",
        *["ramping"] * 4,
        "fixed",
    ]


@CASES.reads(REFUSALS)
def test_a_section_is_never_silently_ignored() -> None:
    (seen,) = results(1)[REFUSALS[1:]]
    assert seen["unbound"] == (
        "MolsError: MolsCallback has no trainer: call callback.bind(trainer) before trainer.train()"
    )
    assert 'no "mols" section' in seen["no section"]
    assert 'the "mols" sections of the argument and of the DeepSpeed config differ' in seen["two sections"]
    assert 'unknown key; did you mean "samples"' in seen["wrong key"]
    assert seen["off"] == "trained"
    assert "bound to another trainer" in seen["two trainers"]
    assert "has no MoLS: its engine was built before bind(trainer)" in seen["bound late"]
