"""What the integrations share, without an engine: keys of the logs, sections, and state that is put back."""

from __future__ import annotations

import random
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mols_ds import MolsConfigError
from mols_ds.core.handle import Handle
from mols_ds.integrations.client import attributes_kept, fill_section, log_values, one_section, random_state_kept


class Measured(Handle):
    """A handle after a calibration, one group of which was never measured."""

    @property
    def multipliers(self) -> dict[str, float]:
        return {"qk": 1.5, "other": 1.0}

    @property
    def applied_lrs(self) -> dict[str, float]:
        return {"qk": 3e-4, "other": 2e-4}

    def report(self) -> dict[str, Any]:
        measured = {"alpha": 2.0, "snr": 0.4, "snr_low": 0.3, "snr_high": 0.5, "elements": 7, "clamped": False}
        return {"groups": {"qk": measured, "other": {**dict.fromkeys(measured), "alpha": 1.0}}}


def test_keys_of_the_logs() -> None:
    assert log_values(Measured()) == {
        "mols/multiplier/qk": 1.5,
        "mols/multiplier/other": 1.0,
        "mols/lr/qk": 3e-4,
        "mols/lr/other": 2e-4,
        "mols/alpha/qk": 2.0,
        "mols/snr/qk": 0.4,
        "mols/snr_low/qk": 0.3,
        "mols/snr_high/qk": 0.5,
        "mols/alpha/other": 1.0,
    }
    assert log_values(Handle()) == {}


@pytest.mark.parametrize(
    ("argument", "config", "expected"),
    [
        ({"start": 1}, None, {"start": 1}),
        (None, {"mols": {"start": 2}}, {"start": 2}),
        ({"start": 1}, {"mols": {"start": 1}}, {"start": 1}),
        ({}, {"zero_optimization": {}}, {}),
        (None, {"mols": {}}, {}),
    ],
)
def test_one_section(argument: Any, config: Any, expected: Any) -> None:
    assert one_section(argument, config, "here") == expected


@pytest.mark.parametrize(
    ("argument", "config", "said"),
    [
        (None, {}, 'here: no "mols" section'),
        (None, None, 'here: no "mols" section'),
        (
            {"start": 1},
            {"mols": {"start": 2}},
            'the "mols" sections of the argument and of the DeepSpeed config differ',
        ),
        (None, {"mols": "on"}, "must be an object"),
    ],
)
def test_sections_that_are_refused(argument: Any, config: Any, said: str) -> None:
    with pytest.raises(MolsConfigError, match=said):
        one_section(argument, config, "here")


def test_auto_is_filled_and_numbers_of_the_user_stay() -> None:
    auto = fill_section({"total_steps": "auto", "ramp_end": "auto", "samples": "auto"}, 100, 7)
    assert (auto.total_steps, auto.ramp_end, auto.samples) == (100, 7, "auto")
    own = fill_section({"total_steps": 50, "ramp_end": 20}, 100, 7)
    assert (own.total_steps, own.ramp_end) == (50, 20)
    assert fill_section({}, None).total_steps is None


def test_random_state_is_put_back() -> None:
    def draws() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    with random_state_kept():
        inside = draws()
    assert draws() == inside


def test_attributes_are_put_back_and_containers_of_others_keep_their_identity() -> None:
    metrics: Any = {"train": defaultdict(list)}
    data, model = [torch.zeros(9999)], torch.nn.Linear(2, 2)
    owner = SimpleNamespace(_metrics=metrics, _tokens=3, _data=data, model=model)
    with attributes_kept(owner):
        owner._metrics["train"]["loss"].append(1.0)
        owner._tokens += 5
        owner.new = True
        owner.model = None
        assert owner._data is data
    assert vars(owner) == {"_metrics": metrics, "_tokens": 3, "_data": data, "model": model}
    assert owner._metrics is metrics and metrics == {"train": {}}
