"""Module state that a batch changes is restored, and a probe window has separate random numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mols_ds.core.module_state import ModuleState
from mols_ds.core.probe_window import ProbeWindow


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.arange(4.0))
        self.register_buffer("none", None, persistent=False)
        self.count, self.rate, self.name, self.ready = 3, 0.5, "a", False
        self.other = torch.ones(2)
        self.things: list[int] = []


def resize(m: Any) -> None:
    m.kept.resize_(2).fill_(9)


def convert(m: Any) -> None:
    m.kept.data = m.kept.data.double() + 1


def several(m: Any) -> None:
    m.count, m.rate, m.name, m.ready = m.count + 1, 2.0, "b", True
    m.other = torch.zeros(3)


MOVES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda m: m.kept.add_(1),
    "in place through .data, which no version counter sees": lambda m: m.kept.data.mul_(2),
    "replaced": lambda m: setattr(m, "kept", m.kept + 1),
    "replaced after a change in place": lambda m: setattr(m, "kept", m.kept.add_(1) * 2),
    "registered anew": lambda m: m.register_buffer("kept", torch.zeros(9)),
    "resized in place": resize,
    "another dtype": convert,
    "from None": lambda m: setattr(m, "none", torch.ones(1)),
    "numbers, words, a tensor replaced": several,
    "a tensor in place": lambda m: m.other.add_(5),
}


def look(module: Any) -> str:
    return repr((dict(module._buffers), module.count, module.rate, module.name, module.ready, module.other))


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_move_is_given_back(move: Callable[[Any], Any]) -> None:
    module = Holder()
    state, before, kept = ModuleState([nn.Sequential(module)]), look(module), module.kept
    for _ in range(2):  # one batch after the other
        state.remember()
        move(module)
        state.remember()  # a later micro-batch
        move(module)
        assert look(module) != before
        assert state.restore() == []
        assert look(module) == before and module.kept is kept


def test_what_the_caller_and_the_engine_set_stays() -> None:
    module = Holder()
    module.ds_count = 1
    state = ModuleState([module], leave=("ds_",))
    state.remember()
    module.eval()
    module.things.append(1)
    module.ds_count, module.late = 2, 7
    state.restore()
    assert (module.training, module.things, module.ds_count, module.late) == (False, [1], 2, 7)


def test_a_flag_of_a_module_without_buffers_stays() -> None:
    """It marks a set-up that cannot be undone."""
    module = nn.Linear(2, 2)
    module.ready, module.count = False, 1
    state = ModuleState([module])
    state.remember()
    module.ready, module.count = True, 2
    state.restore()
    assert (module.ready, module.count) == (True, 1)


def test_new_buffers_stay_and_are_named() -> None:
    module = Holder()
    state = ModuleState([module])
    state.remember()
    module.register_buffer("late", torch.ones(1))
    assert state.restore() == ["Holder.late"] and module.late is not None


def test_tensors_that_cannot_change_are_left_alone() -> None:
    module = Holder()
    module.register_buffer("wide", torch.arange(3).expand(5, 3))
    module.register_buffer("empty", torch.empty(2, device="meta"))
    with torch.inference_mode():
        module.register_buffer("fixed", torch.ones(2))
    state = ModuleState([module])
    state.remember()
    assert state.restore() == []


def test_scales_of_transformer_engine_are_given_back_and_its_flags_stay() -> None:
    """By the names in its source; the real ones need a GPU (tests/gpu)."""
    module: Any = nn.Linear(2, 2)
    scaling = SimpleNamespace(scale=torch.ones(3), amax_history=torch.zeros(4, 3))
    module.fp8_meta, module.fp8_initialized, module.calls = {"scaling_fwd": scaling, "recipe": None}, False, 1
    newest = scaling.amax_history[0]  # the value in the global buffer
    state = ModuleState([module])
    state.remember()
    newest.add_(7)
    scaling.scale.mul_(3)
    module.fp8_initialized, module.calls = True, 2
    state.restore()
    assert not newest.any() and scaling.scale.tolist() == [1, 1, 1]
    assert (module.fp8_initialized, module.calls) == (True, 2)


def test_sums_for_logging_are_given_back() -> None:
    values, entry, bare = torch.ones(2), SimpleNamespace(values=torch.ones(2)), torch.ones(2)
    sums = {"dict": {"values": values}, "entry": entry, "bare": bare}
    state = ModuleState([], trackers=lambda: [sums])
    state.remember()
    for tensor in (values, entry.values, bare):
        tensor.add_(1)
    sums["new"] = torch.ones(1)
    state.restore()
    assert list(sums) == ["dict", "entry", "bare"]
    assert all(tensor.tolist() == [1, 1] for tensor in (values, entry.values, bare))


# ------------------------------------------------------------------ the window


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.rand())


def seed() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


def test_passes_draw_from_a_stream_of_their_own() -> None:
    seed()
    expected = [draws() for _ in range(5)]
    seed()
    window = ProbeWindow(ModuleState([]))
    inside, outside = [], []
    for number in range(3):
        window.open_pass()
        inside.append(draws())
        window.open_pass()  # a model that calls itself
        window.close_pass()
        window.close_pass()
        outside += [draws()] if number == 1 else []  # a loader
        window.close_batch()
    window.restore()
    assert inside == expected[:3] and outside == expected[:1]
    assert draws() == expected[1]


def test_generators_of_modules_are_given_back_at_the_end() -> None:
    module = nn.Module()
    module.generator = torch.Generator().manual_seed(1)
    before = module.generator.get_state()
    window, drawn = ProbeWindow(ModuleState([module])), set()
    for _ in range(3):
        window.open_pass()
        drawn.add(float(torch.rand((), generator=module.generator)))
        window.close_pass()
        window.close_batch()
    assert len(drawn) == 3, "the samples need different numbers"
    window.restore()
    assert torch.equal(module.generator.get_state(), before)


@pytest.mark.parametrize("trainable", [True, False])
def test_parameters_that_a_pass_moves_are_named(trainable: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Embedding(9, 4, max_norm=0.1), nn.Linear(3, 3).bfloat16())
    model.requires_grad_(trainable)
    window = ProbeWindow(ModuleState([model]))
    for token in (2, 3):
        window.open_pass()
        model[1](torch.tensor([token]))  # brings a row below max_norm in place
        with torch.no_grad():
            model[2].bias[1] += 1
        window.close_pass()
        window.close_batch()
    assert window.restore() == ["1.weight", "2.bias"] and window.restore() == []
    window.open_pass()
    window.close_pass()
    assert window.restore() == []


def test_a_window_goes_on_from_its_state() -> None:
    seed()
    window = ProbeWindow(ModuleState([]))
    assert window.state_dict() is None
    window.open_pass()
    draws()
    window.close_pass()
    saved = window.state_dict()
    window.open_pass()
    expected = draws()
    window.close_pass()
    other = ProbeWindow(ModuleState([]))
    other.load_state_dict(saved)
    seed()
    other.open_pass()
    assert draws() == expected
    other.close_pass()
    other.restore()
    assert other.state_dict() is None


def test_a_window_of_0_4_0_sets_the_generator_at_its_end() -> None:
    torch.manual_seed(5)
    then, expected = torch.get_rng_state(), torch.rand(2)
    window = ProbeWindow(ModuleState([]))
    window.load_0_4_0(then, None)
    torch.manual_seed(6)
    window.open_pass()
    window.close_pass()
    window.restore()
    assert torch.equal(torch.rand(2), expected)
