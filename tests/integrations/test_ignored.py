"""A section is never silently ignored: what becomes of it in each client where patch, callback or shim is there."""

from __future__ import annotations

from collections.abc import Callable

import deepspeed
import pytest

import mols_ds
from tests.integrations import own_loop
from tests.integrations.runner import Case, results, table
from tests.integrations.runs import ONLINE, Run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(3600)]

STOCK = deepspeed.initialize
HERE = "test_ignored"
CLIENTS = ("trainer", "sft", "dpo", "accelerate", "lightning", "own loop")


def build(client: str, run: Run) -> str:
    """Phase of the engine that this client builds from a config with a "mols" section, without a word of MoLS."""
    if client == "own loop":
        engine = own_loop.initialize(run)
    elif client == "accelerate":
        from tests.integrations.accelerate_loop import Loop

        engine = Loop(run, "config").engine
    elif client == "lightning":
        from tests.integrations.lightning_fit import train

        return str(train(run, "config alone")["phase"])
    else:
        from tests.integrations.trainers import Spec, Watch, make

        watch = Watch()
        watch.trainer = trainer = make(Spec("", client, mols=run.mols, arguments={"max_steps": 1}), watch, None)
        trainer.train()
        engine = trainer.model_wrapped
    phase = str(engine.mols.phase) if hasattr(engine, "mols") else "stock"
    engine.destroy()
    return phase


def put_stock_back() -> None:
    """As a library does that replaced `deepspeed.initialize` before us and is done with it now."""
    mols_ds.patch()
    deepspeed.initialize = STOCK


def clients(client: str) -> dict[str, str]:
    found = {}
    ways: dict[str, Callable[[], None]] = {"patched": mols_ds.patch, "put back": put_stock_back}
    for name, begin in ways.items():
        begin()
        try:
            found[name] = build(client, Run(2, {**ONLINE, "total_steps": 14}, name.replace(" ", "_")))
        except mols_ds.MolsError as error:
            found[name] = str(error)
        finally:
            mols_ds.unpatch()
            deepspeed.initialize = STOCK
    return found


TABLE: list[Case] = [(1, f"{HERE}:clients", client) for client in CLIENTS]
CASES = table(TABLE)


@CASES.parametrize(("world", "name", "client"), TABLE, reads=lambda case: [case])
def test_with_patch_it_is_carried_out_or_an_error(world: int, name: str, client: str) -> None:
    (seen,) = results(world)[name, client]
    assert seen["patched"] in ("waiting", "fixed")  # Lightning is trained to the end
    assert seen["put back"].startswith('the "mols" section would be left out: this engine is not built by the')
