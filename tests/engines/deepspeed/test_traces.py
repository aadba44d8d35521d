"""A probe window leaves no trace of any kind that its batches move in a model (`traces.py`), an engine or a loader."""

from __future__ import annotations

import functools
import random
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.engines.deepspeed.engines import LR, OFFLOAD_ALL, config, engine_of
from tests.engines.deepspeed.models import TOKENS, Tiny
from tests.engines.deepspeed.traces import Traced, begin, visible
from tests.helpers.digests import caught, differing
from tests.helpers.harness import Results, run_cases
from tests.helpers.oracle.models import groups_of
from tests.helpers.tiers import Cases

pytestmark = pytest.mark.distributed

EPOCHS, ORDER_SEED = 6, 11
WORLD, SAMPLES, START, STEPS, MICROS = 2, 5, 2, 5, 2
NO_EFFECT = {"mode": "probe", "samples": SAMPLES, "start": START, "ramp_end": 4, "alpha_min": 1.0, "alpha_max": 1.0}
ENGINES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "0": (0, "fp32", {}),
    "0 fp16": (0, "fp16", {}),
    "1": (1, "fp32", {}),
    "1 BF16_Optimizer": (1, "bf16 fp32 grads", {}),
    "2": (2, "bf16", {}),
    "3": (3, "fp32", {}),
    "3 offload all": (3, "fp32", OFFLOAD_ALL),
}
AT_THE_END = ("module .generator", "tracker")
"""Keys of `visible` that are restored at the end of the window, because each sample draws different numbers."""
STOCK = {
    "probed": "stock",
    "detached": "stock",
    "broken": "stock",
    "by hand": "stock by hand",
    "in eval mode": "stock in eval mode",
}
SAME = [("probed", name) for name in ENGINES]
SAME += [(way, name) for way in ("by hand", "in eval mode") for name in ("0", "2", "3")]
SAME += [("detached", name) for name in ("0", "3")]
SAME += [("broken", name) for name in ("0", "0 fp16", "3")]  # a loss scale that scales no loss does not fall
RESUMED = [("resumed", name) for name in ("0", "2", "3")]
CASES = Cases(
    [*SAME, *((STOCK[way], name) for way, name in SAME if way not in ("broken", "detached")), *RESUMED],
)


def batch(iteration: int, micro: int) -> Tensor:
    """Of other lengths: longer ones in the window, whose iterations are 300 and more."""
    generator = torch.Generator().manual_seed(1_000 * iteration + 10 * micro + dist.get_rank())
    length = 7 + (iteration >= 300) * 6
    return (torch.rand(2, length, generator=generator) ** 3 * TOKENS).long()


def built(name: str, way: str) -> Any:
    stage, precision, zero = ENGINES[name]
    begin()
    torch.manual_seed(1)
    model = Traced()
    mols = None if way.startswith("stock") else NO_EFFECT
    settings = config(stage, mols, precision=precision, zero=zero, micros=MICROS)
    optimizer = torch.optim.AdamW(groups_of(model, LR, 2 * LR, 0.1))
    engine = engine_of(settings, model, optimizer, initialize=None if mols else deepspeed.initialize)
    seed(7)
    return engine


def seed(number: int) -> None:
    torch.manual_seed(number + dist.get_rank())
    random.seed(number)
    np.random.seed(number)


def iterate(engine: Any, iteration: int, by_hand: bool, broken: bool = False) -> None:
    """One global batch; `by_hand`: the loop says where it ends and calls `engine.step` once, as Accelerate does."""
    for micro in range(MICROS):
        if by_hand:
            engine.set_gradient_accumulation_boundary(micro == MICROS - 1)
        engine.backward(engine(batch(iteration, micro)) * (float("nan") if broken else 1.0))
        if not by_hand or micro == MICROS - 1:
            engine.step()


def trained(way: str, name: str) -> dict[str, Any]:
    """STEPS updates, with a probe window or without; visible state after each, and the changes of the window."""
    engine = built(name, way)
    engine.module.train("eval" not in way)
    result: dict[str, Any] = {"steps": [], "batches": []}
    probes, before = 0, None
    with caught() as warned:
        while engine.global_steps < STEPS:
            if hasattr(engine, "mols") and engine.mols.phase == "calibrating":
                before = before or visible(engine)
                if way == "detached" and probes == 2:
                    engine.mols.detach()
                    result["window"] = differing(before, visible(engine))
                    continue
                if way == "resumed" and probes == 2:
                    engine = resumed(engine, name)
                    loaded = visible(engine)
                    result["loaded"] = [key for key in differing(before, loaded) if saved(engine, key)]
                    before = loaded | {key: before[key] for key in AT_THE_END}
                iterate(engine, 300 + probes, "by hand" in way, broken=way == "broken" and probes == 0)
                probes += 1
                result["batches"] += differing(before, visible(engine), *AT_THE_END)
                if engine.mols.phase != "calibrating":
                    result["window"] = differing(before, visible(engine))
                continue
            iterate(engine, engine.global_steps, "by hand" in way)
            result["steps"].append(visible(engine))
    result["probes"], result["warned"] = probes, warned
    engine.destroy()
    return result


def resumed(engine: Any, name: str) -> Any:
    """Save between two micro-batches of a sample, and continue in another engine."""
    folder = name.replace(" ", "-")
    engine.backward(engine(batch(900, 0)))
    engine.save_checkpoint(folder, tag="inside")
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    engine.destroy()
    engine = built(name, "probed")
    path, _ = engine.load_checkpoint(folder, tag="inside")
    assert path is not None and engine.mols.phase == "calibrating" and engine.mols.samples == 2
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])
    return engine


def saved(engine: Any, key: str) -> bool:
    """Whether a key of `visible` is in DeepSpeed's checkpoints, or in ours."""
    where, _, name = key.partition(" ")
    if where == "module":
        return name in engine.module.state_dict()
    return where in ("weight", "master", "exp_avg", "random") or key.endswith("'s generator")


def loaded(dropout: float) -> list[list[int]]:
    """The order of each of EPOCHS epochs of a user's loader, which draws them from torch's generator."""
    torch.manual_seed(1)
    model = Tiny(dropout)
    settings = config(3, {**NO_EFFECT, "start": 1, "samples": 8}, micros=1)
    engine = engine_of(settings, model, torch.optim.AdamW(groups_of(model, LR, 2 * LR, 0.1)))
    torch.manual_seed(ORDER_SEED)
    loader, orders, iteration = DataLoader(list(range(64)), batch_size=16, shuffle=True), [], 0
    for _ in range(EPOCHS):
        orders.append([])
        for indices in loader:
            orders[-1] += indices.tolist()
            engine.backward(engine(batch(iteration, 0)))
            engine.step()
            iteration += 1
    assert engine.mols.phase != "calibrating"
    engine.destroy()
    return orders


class Untidy(Tiny):
    """Moves a parameter in its forward pass, and registers a buffer late."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.momentum = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > 7:
            self.register_buffer("late", tokens.float().mean())
        self.momentum.data *= 0.9
        return super().forward(tokens)


def named() -> dict[str, list[str]]:
    """The warnings of a run that is observed, of an untidy model, and of passes around the model's `forward`."""
    found: dict[str, list[str]] = {}
    for kind in ("observed", "untidy", "around"):
        monitor = {"enabled": True, "output_path": "csv", "job_name": "probe"}
        more = {"csv_monitor": monitor} if kind == "observed" else {}
        model = Untidy() if kind == "untidy" else Tiny()
        with caught() as warned:
            engine = engine_of(
                config(0, NO_EFFECT, micros=1, **more), model, torch.optim.SGD(model.parameters(), lr=0.1)
            )
            for iteration in range(START + SAMPLES + 1):
                tokens = batch(300 if iteration > START else 0, iteration)
                engine.backward(engine.module.forward(tokens) if kind == "around" else engine(tokens))
                engine.step()
            engine.destroy()
        found[kind] = [text for text in warned if "probe" in text or "passes" in text]
    return found


def work(kind: str, *arguments: Any) -> Any:
    return {"trained": trained, "loaded": loaded, "named": named}[kind](*arguments)


@functools.cache
def runs() -> Results:
    return run_cases(work, WORLD, [("trained", *case) for case in CASES.wanted], timeout=60)


@functools.cache
def orders() -> Results:
    return run_cases(work, WORLD, [("loaded", 0.0), ("loaded", 0.1)], timeout=60)


@CASES.parametrize(("way", "name"), SAME, reads=lambda case: [case, (STOCK[case[0]], case[1])])
def test_no_trace(way: str, name: str) -> None:
    """Of any kind, in the window and behind it, bit for bit."""
    for stock, probed in zip(runs()["trained", STOCK[way], name], runs()["trained", way, name], strict=True):
        assert [text for text in probed["warned"] if "window" in text] == []
        assert probed["probes"] == {"broken": SAMPLES + 1, "detached": 2}.get(way, SAMPLES)
        assert probed["batches"] == probed["window"] == []
        for step, (expected, seen) in enumerate(zip(stock["steps"], probed["steps"], strict=True)):
            assert differing(expected, seen) == [], step


@CASES.parametrize(("way", "name"), RESUMED)
def test_a_checkpoint_inside_a_window_holds_the_state_before_it(way: str, name: str) -> None:
    for rank, probed in enumerate(runs()["trained", way, name]):
        if rank == 0 or name == "3":  # below stage 3, DeepSpeed saves the buffers of the first rank
            assert probed["loaded"] == []
        assert probed["window"] == [] and probed["probes"] == SAMPLES


@pytest.mark.tier("all")
def test_a_loader_goes_on_as_without_a_probe() -> None:
    """Epochs that begin inside a window have orders of their own; of a model that draws nothing, those of the loader
    alone. Setting the generator back at the end of the window repeated them."""
    torch.manual_seed(ORDER_SEED)
    loader = DataLoader(list(range(64)), batch_size=16, shuffle=True)
    alone = [[int(index) for indices in loader for index in indices] for _ in range(EPOCHS)]
    for quiet, drawing in zip(orders()["loaded", 0.0], orders()["loaded", 0.1], strict=True):
        assert quiet == alone
        assert len({tuple(order) for order in drawing}) == EPOCHS and drawing[0] == alone[0]


@pytest.mark.tier("all")
def test_what_is_not_given_back_is_named_once() -> None:
    for found in run_cases(work, WORLD, [("named",)], timeout=60)["named",]:
        assert len(found["observed"]) <= 1 and all("the monitor writes events" in text for text in found["observed"])
        late, moved = found["untidy"]
        assert "Untidy.late" in late and "changed 1 parameters (momentum)" in moved
        (around,) = found["around"]
        assert "no forward pass of the model ran in a batch" in around
