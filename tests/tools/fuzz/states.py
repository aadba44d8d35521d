"""The MoLS state of a checkpoint, mutated: refused whole, or taken over and usable."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st

from mols_ds.core.config import MolsConfig
from mols_ds.core.controller import Controller
from mols_ds.core.groups import GroupTable
from mols_ds.core.layout import ElementLayout
from mols_ds.core.local_stats import LocalStats
from mols_ds.core.phases import Schedule
from mols_ds.core.protocols import Context
from mols_ds.core.ranges import ShardRange
from mols_ds.errors import MolsCheckpointError
from tests.tools.fuzz.common import ACCEPTED, JSON, REFUSED, SCALARS, Target, mutated, refused_by

SIZES = {"qk": 40, "vo": 30, "mlp": 20}


@cache
def table() -> GroupTable:
    layouts = {f"w_{group}": ElementLayout.whole(group) for group in SIZES}
    return GroupTable(layouts, {f"w_{group}": (size,) for group, size in SIZES.items()})


def controller() -> Controller:
    config = MolsConfig.parse({"start": 2, "ramp_end": 20, "samples": 8, "report_dir": "/nonexistent/mols"})
    context = Context(lambda sums: sums, torch.device("cpu"), 1, {"data": 2}, {}, log=lambda _: None)
    return Controller(config, table(), owned(), Schedule(2, 20), context)


def owned() -> list[ShardRange]:
    pieces, at = [], 0
    for group, size in SIZES.items():
        pieces.append(ShardRange(f"w_{group}", 0, at, size))
        at += size
    return pieces


def sampled(elements: LocalStats, samples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(samples):
        elements.open()
        elements.add(0, torch.randn(elements.numel, generator=generator), 1.0)
        elements.close()


@cache
def states() -> list[dict[str, Any]]:
    """A state of each phase."""
    found = []
    made = controller()
    found.append(made.state_dict())
    made.advance(2)
    for _ in range(3):
        sampled(made.elements, 1)
        made.state.count(True)
    found.append(made.state_dict())
    done = controller()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done.advance(2)
        sampled(done.elements, 7)
        done.state.samples = done.state.attempts = 7
        done.elements.open()
        done.elements.add(0, torch.ones(done.elements.numel), 1.0)
        done.close_sample(2, usable=True)
        found.append(done.state_dict())
        done.advance(20)
    found.append(done.state_dict())
    assert [state["state"]["phase"] for state in found] == ["waiting", "calibrating", "ramping", "fixed"]
    return copy.deepcopy(found)


def check_state(saved: Any) -> str:
    target = controller()
    before = copy.deepcopy(target.state_dict())
    result = refused_by(lambda: target.load_state_dict(saved), MolsCheckpointError)
    if result == REFUSED:
        assert target.state_dict() == before, "a refused state changed something"
        return result
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in (0, 5, 30):
            target.advance(t)
            assert set(target.rates(t)) == set(SIZES)
            assert all(0.0 < rate < float("inf") for rate in target.rates(t).values())
            target.applied(t, dict.fromkeys(SIZES, 1e-3))
        target.follow_config(30)
        again = controller()
        again.load_state_dict(copy.deepcopy(target.state_dict()))
        assert again.state_dict() == target.state_dict()
        if target.measuring:
            target.state.exhausted()
        target.restart(30, "fuzz")
    return ACCEPTED


# ------------------------------------------------------------------ accumulators


@cache
def accumulators() -> dict[str, Any]:
    elements = LocalStats(owned(), table().layouts, tuple(SIZES), torch.device("cpu"))
    sampled(elements, 9)
    state = elements.state_dict()
    assert state is not None
    return state


@st.composite
def changed_accumulators(draw: st.DrawFn) -> Any:
    base = accumulators()
    state: Any = {"owned": [list(piece) for piece in base["owned"]], "moments": dict(base["moments"])}
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from([*base["moments"], "owned", "owned", "moments", "piece"]))
        wrong = st.one_of(
            SCALARS,
            JSON,
            st.sampled_from([torch.zeros(3), torch.zeros(90, dtype=torch.float64), torch.zeros(2, 3, 7)]),
        )
        if key == "piece" and isinstance(state.get("owned"), list) and state["owned"]:
            state["owned"][0] = draw(st.one_of(JSON, st.lists(SCALARS, min_size=4, max_size=4)))
        elif key in ("owned", "moments") or not isinstance(state.get("moments"), dict):
            state[key if key in ("owned", "moments") else "moments"] = draw(wrong)
        elif draw(st.booleans()):
            state["moments"].pop(key, None)
        else:
            state["moments"][key] = draw(wrong)
    return state if draw(st.integers(0, 20)) else draw(JSON)


def check_accumulators(saved: Any) -> str:
    elements = LocalStats(owned(), table().layouts, tuple(SIZES), torch.device("cpu"))
    saved = copy.deepcopy(saved)  # a load takes the tensors over by copying; the case is shown as it was
    result = refused_by(lambda: elements.load_state_dict(saved), MolsCheckpointError)
    if result == REFUSED:
        assert elements.accumulators is None, "a refused state left accumulators"
        return result
    assert elements.accumulators is not None
    if elements.accumulators.count >= 2:  # a variance needs two
        elements.gradient_sums()
    sampled(elements, 1)
    return ACCEPTED


MUTATED_STATES = st.deferred(lambda: st.sampled_from(states()).flatmap(mutated))
TARGETS = [
    Target("checkpoint state (state_check.py)", MUTATED_STATES, check_state, 1000),
    Target("accumulators (local_stats.py, accumulators.py)", changed_accumulators(), check_accumulators, 400),
]
