"""Interrupted in every phase, saved, built anew and loaded: the rest of the run is that of the uninterrupted one."""

from __future__ import annotations

import functools
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mols_ds
from tests.engines.torch.models import EMPTY, Tiny, sharded_by_rows, tokens
from tests.engines.torch.parallel import data_rank, full_weights, tiny, wrapped
from tests.helpers.digests import caught, digest
from tests.helpers.harness import Results, run_cases
from tests.helpers.oracle.models import batch, loss_of
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

START, SAMPLES, RAMP_END, UPDATES = 2, 4, 9, 11
SECTION = {"start": START, "samples": SAMPLES, "ramp_end": RAMP_END, "alpha_min": 1e-3, "alpha_max": 1e3}
STOPS = {"waiting": 1, "no sample yet": 2, "calibrating": 4, "ramping": 8, "fixed": 14}
"""Iterations before the checkpoint; in mode "probe". In the others "fixed" is at 10."""
MODES = ("probe", "online", "moments")
WORLD = {"one": 1, "empty rank": 3}
"""Way to run -> number of ranks, where it is not 2."""

Case = tuple[str, str, str, str]  # way to run, mode, phase, way to save
CASES = Cases(
    [
        *(("one", mode, phase, "file") for mode in MODES for phase in STOPS),
        *(("ddp", mode, "calibrating", "file") for mode in MODES),
        *(("fsdp2", mode, phase, "dcp") for mode in MODES for phase in ("calibrating", "ramping")),
        ("fsdp2", "probe", "no sample yet", "dcp"),
        ("fsdp2", "probe", "calibrating", "file"),
        ("tp", "online", "calibrating", "file"),
        *(("empty rank", mode, "calibrating", "dcp") for mode in MODES),
        ("empty rank", "online", "calibrating", "file"),
        ("empty rank", "online", "ramping", "dcp"),
    ],
    quick=[
        ("one", "moments", "ramping", "file"),
        ("ddp", "probe", "calibrating", "file"),
        ("fsdp2", "online", "calibrating", "dcp"),
        ("empty rank", "online", "calibrating", "dcp"),
    ],
    full=[
        *(("one", mode, phase, "file") for mode in MODES[1:] for phase in ("waiting", "no sample yet", "fixed")),
        *(("fsdp2", mode, "ramping", "dcp") for mode in ("probe", "moments")),
        *(("ddp", "moments", "calibrating", "file"), ("empty rank", "online", "calibrating", "file")),
    ],
)


class Run:
    """A model (with dropout and BatchNorm where it is not sharded), its optimizer and MoLS."""

    def __init__(self, how: str, mode: str, seed: int = 0, **more: Any) -> None:
        torch.manual_seed(seed)
        self.how = how
        self.model: nn.Module = Tiny(0.2) if how in ("one", "ddp") else tiny("llama")
        if how == "empty rank":
            self.model = Tiny(0.2, *EMPTY)
            self.model.batch_norm.momentum = 0.0  # each rank of FSDP2 has its own buffers; DCP saves rank 0's
            self.run = sharded_by_rows(self.model)
        else:
            self.run = DistributedDataParallel(self.model) if how == "ddp" else wrapped(how, self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, eps=1e-6, betas=(0.9, 0.95))
        section = {**SECTION, "mode": mode, **more}
        self.mols = mols_ds.attach(self.optimizer, self.run, section, total_steps=UPDATES)
        torch.manual_seed(5 + (dist.get_rank() if dist.is_initialized() else 0))

    def iterate(self, iteration: int) -> None:
        if self.how == "empty rank":
            self.run(tokens(iteration, dist.get_rank(), EMPTY[1])).backward()
        elif isinstance(self.model, Tiny):
            self.run(tokens(iteration, data_rank(self.how))).backward()
        else:
            loss_of(self.run, batch(iteration, 0, data_rank(self.how))).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seen(self) -> dict[str, Any]:
        found = {name: digest(_local(value)) for name, value in self.model.state_dict().items()}
        for i, state in enumerate(self.optimizer.state.values()):
            found |= {f"{i} {key}": digest(_local(torch.as_tensor(value))) for key, value in state.items()}
        mols = self.mols
        found |= {"alphas": mols.alphas, "report": mols.report(), "phase": mols.phase, "steps": mols.steps}
        return found | {"multipliers": mols.multipliers, "random": digest(torch.get_rng_state())}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def iterations(mode: str) -> int:
    return UPDATES + (SAMPLES if mode == "probe" else 0)


def stop_of(mode: str, phase: str) -> int:
    return 10 if phase == "fixed" and mode != "probe" else STOPS[phase]


def save(run: Run, way: str, folder: str) -> Any:
    """What a user keeps: model, optimizer, MoLS, random numbers."""
    random = torch.get_rng_state()
    if way == "file":
        buffer = io.BytesIO()
        states = run.model.state_dict(), run.optimizer.state_dict(), run.mols.state_dict(), random
        torch.save(states, buffer)
        return buffer
    model, optimizer = get_state_dict(run.model, run.optimizer)
    dcp.save({"model": model, "optimizer": optimizer, "mols": run.mols}, checkpoint_id=folder)
    return random


def load(run: Run, way: str, folder: str, saved: Any) -> None:
    if way == "file":
        saved.seek(0)
        model, optimizer, mols, random = torch.load(saved, weights_only=run.how == "one")
        run.model.load_state_dict(model)
        run.optimizer.load_state_dict(optimizer)
        run.mols.load_state_dict(mols)
        torch.set_rng_state(random)
        return
    model, optimizer = get_state_dict(run.model, run.optimizer)
    run.mols.resume_from(folder)
    dcp.load({"model": model, "optimizer": optimizer, "mols": run.mols}, checkpoint_id=folder)
    set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    torch.set_rng_state(saved)


def resumed(how: str, mode: str, phase: str, way: str) -> dict[str, Any]:
    """The last state of a run, whole and interrupted, and what was said when it was loaded."""
    whole = Run(how, mode)
    for iteration in range(iterations(mode)):
        whole.iterate(iteration)
    first = Run(how, mode)
    stop = stop_of(mode, phase)
    for iteration in range(stop):
        first.iterate(iteration)
    folder = f"{how}-{mode}-{phase}-{way}".replace(" ", "-")
    at_stop = first.mols.phase
    saved = save(first, way, folder)
    first.mols.detach()
    with caught() as said:
        second = Run(how, mode, seed=99)
        load(second, way, folder, saved)
    loaded = second.mols.phase
    for iteration in range(stop, iterations(mode)):
        second.iterate(iteration)
    return {"whole": whole.seen(), "resumed": second.seen(), "said": said, "phases": (at_stop, loaded)}


@functools.cache
def results(world: int) -> Results:
    return run_cases(resumed, world, [case for case in CASES.wanted if WORLD.get(case[0], 2) == world], timeout=120)


@CASES.parametrize("case", ids="-".join)
def test_a_resumed_run_is_the_uninterrupted_one(case: Case) -> None:
    how, _, phase, _ = case
    for rank in results(WORLD.get(how, 2))[case]:
        expected = "calibrating" if phase == "no sample yet" else phase
        assert rank["phases"] == (expected, expected)
        assert [key for key, value in rank["whole"].items() if rank["resumed"][key] != value] == []
        assert rank["said"] == [] and rank["whole"]["phase"] == "fixed"


# --- other ranks, lost parts, MoLS off -------------------------------------------------------------------------------


def moved(mode: str, phase: str) -> dict[str, Any]:
    """Saved by two ranks, loaded by each alone: what is said, the phase, the alphas."""
    run = Run("fsdp2", mode)
    for iteration in range(stop_of(mode, phase)):
        run.iterate(iteration)
    states = {name: p for name, p in full_weights(run.model).items()}
    return {"mols": run.mols.state_dict(), "weights": states, "alphas": run.mols.alphas, "phase": run.mols.phase}


@pytest.mark.tier("all")
@pytest.mark.parametrize(
    ("mode", "phase"), [("online", "calibrating"), ("online", "ramping"), ("probe", "calibrating")]
)
def test_another_number_of_ranks(mode: str, phase: str) -> None:
    """Alphas and ramp continue; a partial calibration starts over."""
    saved = run_cases(moved, 2, [(mode, phase)])[mode, phase][0]
    assert saved["phase"] == phase
    alone = Run("one", mode)
    alone.mols.detach()
    model = tiny("llama")
    model.load_state_dict(saved["weights"], strict=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with caught() as said:
        mols = mols_ds.attach(optimizer, model, {**SECTION, "mode": mode}, total_steps=UPDATES)
        mols.load_state_dict(saved["mols"])
    if phase == "ramping":
        assert said == [] and mols.alphas == saved["alphas"] and mols.phase == "ramping"
    else:
        line = said[0]
        assert all("the calibration begins now" in other for other in said[1:])
        assert "the partial calibration of this checkpoint cannot be continued" in line and "it starts over" in line
        assert "another number of ranks cannot continue them" in line
        assert mols.phase == "calibrating" and mols.samples == 0


def alone_saved(phase: str) -> list[str]:
    """DDP, where the loop saves rank 0's state alone: what each rank says when it loads it."""
    run = Run("ddp", "online")
    for iteration in range(stop_of("online", phase)):
        run.iterate(iteration)
    kept = [run.mols.state_dict()]
    dist.broadcast_object_list(kept)
    run.mols.detach()
    again = Run("ddp", "online")
    with caught() as said:
        again.mols.load_state_dict(kept[0])
    for iteration in range(3):
        again.iterate(iteration)
    return said


@pytest.mark.tier("all")
def test_a_state_that_rank_0_saved_alone() -> None:
    results = run_cases(alone_saved, 2, [("calibrating",), ("fixed",)])
    first, other = results["calibrating",]
    assert "rank 1: the state has none of rank 00001 of 00002: call state_dict() on every rank" in first[0]
    assert other == []  # once a job
    assert results["fixed",] == [[], []]


def test_off_keeps_the_state() -> None:
    first = Run("one", "online")
    for iteration in range(8):
        first.iterate(iteration)
    saved = first.mols.state_dict()
    first.mols.detach()
    off = Run("one", "online", enabled=False)
    with caught() as said:
        off.mols.load_state_dict(saved)
    assert any("which is off in this run" in line for line in said) and off.mols.phase == "disabled"
    off.iterate(8)
    kept = off.mols.state_dict()
    off.mols.detach()
    again = Run("one", "online")
    with caught() as said:
        again.mols.load_state_dict(kept)
    assert any("MoLS was off from step 8 to step 9" in line for line in said)
    assert again.mols.alphas == first.mols.alphas and again.mols.steps == 9


@pytest.mark.parametrize("state", [{}, {"common": "{"}, {"common": "{}"}, None, {"common": 3}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    run = Run("one", "online")
    with pytest.raises(mols_ds.MolsCheckpointError, match=r"not the result of mols\.state_dict"):
        run.mols.load_state_dict(state)


@pytest.mark.parametrize("order", ["optimizer alone", "optimizer, mols", "mols, optimizer"])
def test_an_optimizer_that_is_loaded_without_mols_counts_its_steps(order: str) -> None:
    first = Run("one", "online")
    for iteration in range(8):
        first.iterate(iteration)
    optimizer, mols = first.optimizer.state_dict(), first.mols.state_dict()
    first.mols.detach()
    second = Run("one", "online")
    if order == "mols, optimizer":
        second.mols.load_state_dict(mols)
    second.optimizer.load_state_dict(optimizer)
    if order == "optimizer, mols":
        second.mols.load_state_dict(mols)
    with caught() as said:
        second.iterate(8)
        second.iterate(9)  # a calibration that begins has seen its backward pass
    alone = order == "optimizer alone"
    assert any("the checkpoint at step 9 has no MoLS state" in line for line in said) is alone
    assert second.mols.steps == 10 and second.mols.phase == ("calibrating" if alone else "fixed")
