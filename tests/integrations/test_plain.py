"""The clients without DeepSpeed, beside the table: clipping, loss scales, kinds of models, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import mols_ds
from mols_ds.core.handle import Handle
from mols_ds.integrations.client import load_state
from tests.integrations.runner import Case, results, table
from tests.integrations.runs import ONLINE, PLAIN, SECTION, Run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(3600)]

HERE = "test_plain"
CLIENTS = ("Trainer", "Accelerate", "Lightning")
SCALE = 2.0**10
STILL = {**ONLINE, "start": 0}


def train(client: str, name: str, mols: Any, lr: float, clip: float | None, scale: float | None = None) -> Any:
    """A run with this rate, clipped at this norm (None: not at all), with this loss scale."""
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        if client == "Trainer":
            from tests.integrations import trainers

            rates = {"learning_rate": lr, "max_grad_norm": clip or 0.0}
            return trainers.train(
                trainers.Spec(stage=PLAIN, mols=mols, argument=True, arguments=rates, out=name, scaler=scale)
            )
        if client == "Accelerate":
            from tests.integrations import accelerate_loop as loop

            patch.setattr(loop, "SCALER", scaler)
            patch.setattr(loop, "CLIP", clip or float("inf"))
        else:
            from tests.integrations import lightning_fit as loop  # type: ignore[no-redef]

            from lightning.pytorch.plugins import MixedPrecision  # isort: skip

            class Scaled(MixedPrecision):  # type: ignore[misc]
                """A loss scale without 16 bits."""

                def autocast_context_manager(self) -> Any:
                    return torch.autocast("cpu", enabled=False)

            patch.setattr(loop, "CLIP", clip)
            patch.setattr(loop, "PLUGINS", None if scaler is None else [Scaled("16-mixed", "cpu", scaler)])
        patch.setattr(loop, "LR", lr)
        return loop.train(Run(PLAIN, mols, name))


def clipping(client: str) -> dict[str, Any]:
    """At rate 0 the weights stay, so that clipping is the only difference."""
    return {name: train(client, name, STILL, 0.0, clip) for name, clip in (("free", None), ("clipped", 1e-3))}


def scaling(client: str) -> dict[str, Any]:
    found = {}
    for mode, mols in (("probe", {}), ("online", ONLINE)):
        for name, scale in (("plain", None), ("scaled", SCALE)):
            found[f"{name} {mode}"] = train(client, f"{name}_{mode}", mols, 2e-3, 1.0, scale)
    return found


def added() -> dict[str, Any]:
    """MoLS in a run that began without it."""
    from tests.integrations.trainers import Spec, train

    stock = Spec("stock", stage=PLAIN, mols=None, arguments={"save_strategy": "steps", "save_steps": 2}, out="stock")
    found = {"stock": train(stock)}
    found["off"] = train(Spec(stage=PLAIN, mols={"enabled": False}, argument=True, out="off"))
    whole = train(Spec(stage=PLAIN, argument=True, out="whole"))
    with pytest.warns(mols_ds.MolsWarning, match="the checkpoint at step 2 has no MoLS state"):
        late = train(Spec(stage=PLAIN, argument=True, out="late", resume="stock/checkpoint-2"))
    return {**found, "whole": whole, "late": late}


def missing() -> str:
    """Rank 1 does not see the folder of the checkpoint."""
    folder = Path(f"seen_by_{dist.get_rank()}")
    folder.mkdir()
    if dist.get_rank() == 0:
        (folder / "mols_0.pt").touch()
    with pytest.raises(mols_ds.MolsCheckpointError) as raised:
        load_state(Handle(), folder)
    return str(raised.value)


def refusals() -> dict[str, str]:
    from accelerate import Accelerator

    from mols_ds.integrations.accelerate import attach
    from mols_ds.integrations.transformers import MolsCallback
    from tests.integrations import lightning_fit
    from tests.integrations.accelerate_loop import Loop
    from tests.integrations.trainers import Spec, Watch, make

    loop = Loop(Run(PLAIN, None, "stock"), "attach")
    accelerator: Accelerator = loop.accelerator
    calls: dict[str, Any] = {
        "no accelerator": lambda: attach(loop.net, SECTION),
        "no optimizer": lambda: attach(loop.net, SECTION, accelerator=accelerator),
        "no section": lambda: attach(loop.net, accelerator=accelerator, optimizer=loop.optimizer),
        "clipped by hand": lambda: _clip_by_hand(loop),
    }
    trainer = make(Spec(stage=PLAIN), Watch(), None)
    calls["Trainer without a section"] = lambda: MolsCallback().bind(trainer)
    two = make(Spec(stage=PLAIN), Watch(), None)
    two.args._n_gpu = 2
    calls["DataParallel"] = lambda: MolsCallback(SECTION).bind(two)
    calls["strategy"] = lambda: _fsdp1(lightning_fit)
    found = {}
    for name, call in calls.items():
        with pytest.raises(mols_ds.MolsError) as raised:
            call()
        found[name] = str(raised.value)
    return found


def _fsdp1(lightning_fit: Any) -> None:
    from lightning.pytorch.strategies import FSDPStrategy

    fit = lightning_fit.pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    fit.strategy.__class__ = FSDPStrategy  # which Lightning refuses on a CPU
    lightning_fit.MolsCallback(SECTION).setup(fit, lightning_fit.Module(), "fit")


def _clip_by_hand(loop: Any) -> None:
    from mols_ds.integrations.accelerate import attach

    attach(loop.net, {**SECTION, "start": 0}, accelerator=loop.accelerator, optimizer=loop.optimizer, total_steps=9)
    loop.accelerator.gradient_state._set_sync_gradients(True)
    loop.accelerator.backward(loop.net(**next(iter(loop.loader))).loss)
    torch.nn.utils.clip_grad_norm_(loop.net.parameters(), 1e-3)
    loop.optimizer.step()


CLIPPING: list[Case] = [(1, f"{HERE}:clipping", client) for client in CLIENTS]
SCALING: list[Case] = [(1, f"{HERE}:scaling", client) for client in CLIENTS]
ADDED: Case = (1, f"{HERE}:added")
REFUSALS: Case = (1, f"{HERE}:refusals")
MISSING: Case = (2, f"{HERE}:missing")
CASES = table([*CLIPPING, *SCALING, ADDED, REFUSALS, MISSING], quick=CLIPPING[:1])


@CASES.parametrize(("world", "name", "client"), CLIPPING, reads=lambda case: [case])
def test_statistics_are_of_unclipped_gradients(world: int, name: str, client: str) -> None:
    (seen,) = results(world)[name, client]
    assert seen["clipped"]["alphas"] == seen["free"]["alphas"]
    assert len(set(seen["free"]["alphas"].values())) > 2


@CASES.parametrize(("world", "name", "client"), SCALING, reads=lambda case: [case])
def test_a_loss_scale_does_not_show(world: int, name: str, client: str) -> None:
    """A power of two: every bit is the same."""
    (seen,) = results(world)[name, client]
    for mode in ("probe", "online"):
        for key in ("alphas", "weights", "lrs", "phases"):
            assert seen[f"scaled {mode}"][key] == seen[f"plain {mode}"][key], (mode, key)


@CASES.reads(ADDED)
def test_a_run_that_began_without_mols() -> None:
    (seen,) = results(1)[ADDED[1:]]
    assert seen["late"]["alphas"] == seen["whole"]["alphas"]
    assert seen["late"]["weights"] == seen["whole"]["weights"]
    assert seen["off"]["phase"] == "disabled" and seen["off"]["weights"] == seen["stock"]["weights"]


@CASES.reads(MISSING)
def test_a_folder_that_only_some_ranks_see_is_an_error_on_all() -> None:
    for text in results(2)[MISSING[1:]]:
        assert "rank 1 does not find this file, rank 0 does" in text


@CASES.reads(REFUSALS)
def test_what_cannot_be_done_is_refused_by_name() -> None:
    (seen,) = results(1)[REFUSALS[1:]]
    assert "without DeepSpeed it needs accelerator=accelerator and optimizer=optimizer too" in seen["no accelerator"]
    assert "optimizer=NoneType is not what accelerator.prepare returned" in seen["no optimizer"]
    assert 'no "mols" section' in seen["no section"]
    assert "call mols.read_gradients() after the backward pass and before you clip" in seen["clipped by hand"]
    assert 'no "mols" section' in seen["Trainer without a section"]
    assert "uses nn.DataParallel on 2 GPUs" in seen["DataParallel"]
    assert "the strategy is FSDPStrategy; Trainer(strategy=...) must be one of DeepSpeedStrategy" in seen["strategy"]
