"""Stage 3 with the optimizer on NVMe: buffers are given back whatever happens, and a parameter that a batch does not
use has the gradient 0, in the samples and in the first step after a probe window.

`memory` needs no libaio: the engine offloads to the CPU, and a dictionary takes the place of the files. Like
DeepSpeed's swapper it hands out a few buffers, keeps a gradient until the next one of that parameter is written, and
leaves what a buffer held before where nothing was.
"""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engines.deepspeed.engines import OFFLOAD, config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.state import full_weights
from tests.engines.deepspeed.test_clients import NVME, built
from tests.engines.deepspeed.test_unused_parameters import Skipping, expected
from tests.helpers.harness import Results, run_cases

pytestmark = [pytest.mark.distributed, pytest.mark.tier("all")]

WORLD, SAMPLES, START, MICROS = 2, 8, 2, 2
NAMES = ("up_proj.weight", "up_proj.bias", "down_proj.weight", "q_proj.weight")
WAYS = ("memory", "files")
GARBAGE = 7.0
WIDE = 4096
SUB_GROUP = 1646
"""Elements of a rank before the MLP: its weights begin sub-groups. DeepSpeed reads wrong numbers from a file into a
buffer that does not begin at a multiple of 512 bytes."""


class Memory:
    """In the place of DeepSpeed's optimizer_swapper on one engine that offloads to the CPU."""

    def __init__(self, outer: Any) -> None:
        self.outer, self.held, self.files = outer, set[int](), dict[int, dict[int, Tensor]]()
        outer._swappable_optimizer_subgroup = lambda i: True
        outer._optimizer_states_and_gradient_swap_in = self.swap_in
        outer._optimizer_states_and_gradient_swap_out = self.release
        outer._release_swap_buffers = self.release
        outer._writeback_swap_state = self.write_back
        outer._offload_grad_partition_at_boundary = self.hand_over

    def hand_over(self, param: Any, gradient: Tensor, *lists: Any) -> None:
        i, offset, _ = self.outer.grad_position[self.outer.get_param_id(param)]
        self.outer.norm_for_param_grads[self.outer.get_param_id(param)] = gradient.float().norm()
        self.files.setdefault(i, {})[int(offset)] = gradient.float().clone()

    def swap_in(self, i: int, timer_names: Any = None) -> None:
        assert not self.held, f"buffers of sub-group {self.held} are held"
        self.held.add(i)
        flat = self.outer.fp32_partitioned_groups_flat[i]
        flat.grad = None
        if i in self.files:
            flat.grad = torch.full_like(flat, GARBAGE)
            for offset, gradient in self.files[i].items():
                flat.grad[offset : offset + gradient.numel()] = gradient

    def release(self, i: int, timer_names: Any = None) -> None:
        self.held.discard(i)
        self.outer.fp32_partitioned_groups_flat[i].grad = None

    def write_back(self, i: int, write_opt_state: bool, write_gradients: bool) -> None:
        flat = self.outer.fp32_partitioned_groups_flat[i]
        for offset, gradient in self.files.get(i, {}).items():
            gradient.copy_(flat.grad[offset : offset + gradient.numel()])
        self.release(i)


def start(way: str, mode: str, lr: float = 1e-9) -> tuple[Any, Skipping, Any]:
    """(engine, its model on one process, function that lists the buffers in use)."""
    torch.manual_seed(0)
    model = Skipping()
    if way == "files":  # gradients under MIN_AIO_BYTES (1 MiB) would silently stay in memory
        importlib.import_module("deepspeed.runtime.swap_tensor.optimizer_utils").MIN_AIO_BYTES = 1 << 16
        model.up_proj, model.down_proj = torch.nn.Linear(19, WIDE), torch.nn.Linear(WIDE, 19)
    plain = copy.deepcopy(model)
    section = {"mode": mode, "start": START, "ramp_end": 40, "samples": SAMPLES, "noise_floor_correction": False}
    zero = {**(NVME if way == "files" else OFFLOAD), "sub_group_size": SUB_GROUP}
    aio = {"block_size": 1 << 16, "queue_depth": 4, "single_submit": False, "overlap_events": False}
    more = {"aio": {**aio, "intra_op_parallelism": 1}} if way == "files" else {}
    settings = config(3, section, zero=zero, micros=MICROS, gradient_clipping=0.0, **more)
    engine = engine_of(settings, model, torch.optim.SGD(list(model.parameters()), lr=lr))
    outer = engine.optimizer
    if way == "memory":
        memory = Memory(outer)
        return engine, plain, lambda: memory.held
    assert any(outer._swappable_optimizer_subgroup(i) for i in range(len(outer.fp16_groups)))
    return engine, plain, lambda: set(outer.optimizer_swapper.swap_buffer_manager.used_buffer_index)


def statistics(way: str, mode: str) -> dict[str, Any]:
    """Largest error of mean and M2 against torch, relative to the largest value, of this rank's elements."""
    engine, plain, held = start(way, mode)
    elements, kept, oracle = engine.mols.controller.elements, {}, []
    free = elements.free

    def keep() -> None:
        if elements.accumulators is not None and not kept:
            kept.update(mean=elements.accumulators.mean.clone(), m2=elements.accumulators.m2.clone())
        free()

    elements.free = keep
    for iteration in range(START + SAMPLES):
        used = iteration < START or iteration % 2 == 1  # the first sample does not use what the last step used
        engine.module.skip = not used
        iterate(engine, iteration, MICROS)
        if iteration >= START:
            oracle.append(expected(plain, iteration, used))
    errors: dict[str, Any] = {"held": held()}
    for key in ("mean", "m2"):
        errors[key] = 0.0
        for item in elements.ranges:
            if item.name in NAMES:
                samples = torch.stack([one[item.name] for one in oracle]).double()
                mean = samples.mean(0)
                true = mean if key == "mean" else ((samples - mean) ** 2).sum(0)
                seen = kept[key][item.offset : item.offset + item.numel]
                error = (seen - true[item.start : item.start + item.numel]).abs().max() / true.abs().max()
                errors[key] = max(errors[key], float(error))
    engine.destroy()
    return errors


def after_the_window(way: str, mode: str) -> dict[str, float]:
    """How far the weights move in the first step after the window, whose batch leaves the MLP out."""
    engine, _, _ = start(way, mode, lr=0.5)
    for iteration in range(START + SAMPLES):
        iterate(engine, iteration, MICROS)
    assert engine.mols.phase == "ramping"
    before = {name: weight.clone() for name, weight in full_weights(engine).items()}
    engine.module.skip = True
    iterate(engine, 99, MICROS)
    moved = {name: float((weight - before[name]).abs().max()) for name, weight in full_weights(engine).items()}
    engine.destroy()
    return moved


def bad(way: str, what: str) -> dict[str, Any]:
    """Buffers in use after a failed sample, and the samples at the end."""
    engine, _, held = start(way, "probe")
    elements, outer = engine.mols.controller.elements, engine.optimizer
    for iteration in range(START + 1):
        iterate(engine, iteration, MICROS)
    seen: dict[str, Any] = {}
    if what == "nan":
        for iteration in range(3):
            iterate(engine, iteration, MICROS, spoil=lambda loss: loss * torch.nan)
            seen[f"held {iteration}"] = held()
        for iteration in range(SAMPLES - 1):
            iterate(engine, iteration, MICROS)
        seen |= {"samples": engine.mols.samples, "failed": engine.mols.report().get("failed")}
        engine.destroy()
        return seen
    swap_in = outer._optimizer_states_and_gradient_swap_in

    def raises(*args: Any) -> None:
        if what == "swap in":
            swap_in(*args)
        raise OSError("the disk is gone")

    if what == "swap in":
        outer._optimizer_states_and_gradient_swap_in = raises
    else:
        elements.add = raises
    try:
        iterate(engine, 0, MICROS)
    except OSError as error:
        seen = {"error": str(error), "held": held()}  # the traceback is alive, and with it the reader's frames
    return seen


CASES = {
    "statistics": (statistics, ("probe", "online")),
    "after": (after_the_window, ("probe",)),
    "bad": (bad, ("nan", "swap in", "reader")),
}


@functools.cache
def results(way: str, name: str) -> Results:
    if way == "files" and not built("AsyncIOBuilder"):
        pytest.skip("DeepSpeed's asynchronous I/O (needs libaio-dev) is not compiled here; compiling it takes minutes")
    function, arguments = CASES[name]
    return run_cases(function, WORLD, [(way, argument) for argument in arguments], timeout=120)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", CASES["statistics"][1])
def test_a_parameter_without_a_gradient_counts_as_zero(way: str, mode: str) -> None:
    for errors in results(way, "statistics")[way, mode]:
        assert errors["mean"] < 1e-4 and errors["m2"] < 1e-4 and not errors["held"], errors


@pytest.mark.parametrize("way", WAYS)
def test_a_discarded_gradient_is_not_stepped_with(way: str) -> None:
    for moved in results(way, "after")[way, "probe"]:
        assert moved["up_proj.weight"] == moved["down_proj.weight"] == 0.0 < moved["q_proj.weight"]


@pytest.mark.parametrize("way", WAYS)
def test_buffers_after_a_gradient_that_is_not_finite(way: str) -> None:
    for seen in results(way, "bad")[way, "nan"]:
        assert [seen[f"held {i}"] for i in range(3)] == [set()] * 3
        assert seen["samples"] == SAMPLES and seen["failed"] is None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["swap in", "reader"])
def test_buffers_after_an_exception(way: str, what: str) -> None:
    for seen in results(way, "bad")[way, what]:
        assert seen == {"error": "the disk is gone", "held": set()}
