"""`factors`: constants beside the measured multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch

from mols_ds.core.config import MolsConfig
from mols_ds.core.controller import Controller
from mols_ds.core.groups import ElementLayout, GroupTable
from mols_ds.core.phases import Schedule
from mols_ds.core.protocols import Context
from mols_ds.core.ranges import ShardRange
from mols_ds.core.schema import Report, schema_problem
from mols_ds.errors import MolsConfigError, MolsWarning
from mols_ds.report.table import headline

ELEMENTS, SAMPLES = 400, 16
NOISE = {"embedding": 3.0, "qk": 1.0, "vo": 0.5, "mlp": 0.4, "other": 1.0}
"""Group -> standard deviation of gradients with mean 0.5."""
SECTION = {"start": 0, "samples": SAMPLES, "ramp_end": 10, "alpha_max": 2.5, "estimator": "pooled"}


def controller(section: Mapping[str, Any]) -> Controller:
    table = GroupTable({group: ElementLayout.whole(group) for group in NOISE}, {group: (ELEMENTS,) for group in NOISE})
    owned = [ShardRange(group, 0, number * ELEMENTS, ELEMENTS) for number, group in enumerate(NOISE)]
    context = Context(lambda x: x, torch.device("cpu"), 0, {"data": 1}, {}, log=lambda _: None)
    return Controller(MolsConfig.parse({**SECTION, **section}), table, owned, Schedule(0, 10), context)


def measured(section: Mapping[str, Any], dead: str = "") -> Controller:
    """A controller after its calibration on seeded samples."""
    made, draws = controller(section), torch.Generator().manual_seed(0)
    made.advance(0)
    for _ in range(SAMPLES):
        made.elements.open()
        for number, (group, deviation) in enumerate(NOISE.items()):
            gradient = 0.5 + deviation * torch.randn(ELEMENTS, generator=draws)
            made.elements.add(number * ELEMENTS, gradient * (group != dead), 1.0)
        made.close_sample(0, usable=True)
    return made


@pytest.mark.filterwarnings("ignore:alpha of group")
def test_they_multiply_the_measured_alpha_and_its_interval() -> None:
    factors = {"embedding": 32.0, "vo": 0.5}
    plain, made = measured({}), measured({"factors": factors})
    assert plain.alphas["embedding"] == 2.5 and plain.alphas["vo"] == 1.0  # at its bound; the reference
    assert made.alphas == {group: alpha * factors.get(group, 1.0) for group, alpha in plain.alphas.items()}
    for group, row in made.report()["groups"].items():
        former = plain.report()["groups"][group]
        scaled = {key: former[key] * factors.get(group, 1.0) for key in ("alpha", "alpha_low", "alpha_high")}
        assert row == {**former, **scaled}
    assert made.report()["factors"] == factors and "factors" not in plain.report()
    assert schema_problem(made.report()) is None
    assert headline(cast(Report, made.report())).endswith("reference vo, alphas times 32 (embedding), 0.5 (vo)")
    assert made.rates(0)["embedding"] == 1.0 and made.rates(10)["embedding"] == 80.0


def test_the_warning_about_a_bound_has_the_measured_value() -> None:
    with pytest.warns(MolsWarning, match=r'"embedding" hit its bound: 2.5 \(alpha_min 0.1, alpha_max 2.5\)'):
        measured({"factors": {"embedding": 32.0}})


def test_a_failed_calibration_keeps_them() -> None:
    made = controller({"factors": {"embedding": 32.0}})
    made.advance(0)
    with pytest.warns(MolsWarning, match="alpha = 1 for every group, times mols.factors"):
        made.give_up(0, "no reason")
    assert made.alphas == {"embedding": 32.0, "qk": 1.0, "vo": 1.0, "mlp": 1.0, "other": 1.0}


@pytest.mark.filterwarnings("ignore:alpha of group")
@pytest.mark.parametrize(("former", "now"), [({}, {"vo": 2.0}), ({"vo": 2.0}, {})])
def test_a_failed_recalibration_keeps_the_former_ones(former: dict[str, float], now: dict[str, float]) -> None:
    made = measured({"factors": former or None})
    kept = made.alphas
    made.config = MolsConfig.parse({**SECTION, "factors": now or None})  # as in a resumed run
    made.advance(10)
    made.state.begin(20)
    with pytest.warns(MolsWarning, match="with the former alphas, without the new mols.factors"):
        made.give_up(20, "no reason")
    assert made.alphas == kept and made.report().get("factors", {}) == former
    assert ("alphas times" in headline(cast(Report, made.report()))) is bool(former)


def test_a_group_without_a_gradient_has_its_factor() -> None:
    with pytest.warns(MolsWarning, match='no element of group "embedding".*its alpha stays 4'):
        made = measured({"factors": {"embedding": 4.0}}, dead="embedding")
    assert made.alphas["embedding"] == 4.0


@pytest.mark.parametrize(
    ("factors", "problem"),
    [
        ({"embeding": 2.0}, '"mols.factors": no group "embeding" in this model; groups: embedding, qk, vo, mlp, other'),
        ({"other": 2.0}, '"mols.factors": group "other" is measured but never scaled'),
    ],
)
def test_unknown_and_unscaled_groups_are_refused(factors: dict[str, float], problem: str) -> None:
    with pytest.raises(MolsConfigError, match=problem):
        controller({"factors": factors})
