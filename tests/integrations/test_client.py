"""What the integrations share, without an engine: keys of the logs, sections, and state that is put back."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mols_ds import MolsCheckpointError, MolsConfigError
from mols_ds.core.handle import Handle
from mols_ds.integrations.client import (
    fill_section,
    load_state,
    log_values,
    preserved_attributes,
    preserved_loader,
    preserved_rng_state,
    resolve_section,
)


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
    assert resolve_section(argument, config, "here") == expected


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
        resolve_section(argument, config, "here")


def test_auto_is_filled_and_numbers_of_the_user_stay() -> None:
    auto = fill_section({"total_steps": "auto", "ramp_end": "auto", "samples": "auto"}, 100, 7)
    assert (auto.total_steps, auto.ramp_end, auto.samples) == (100, 7, "auto")
    own = fill_section({"total_steps": 50, "ramp_end": 20}, 100, 7)
    assert (own.total_steps, own.ramp_end) == (50, 20)
    assert fill_section({}, None).total_steps is None


def test_random_state_is_put_back() -> None:
    def draws() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    with preserved_rng_state():
        inside = draws()
    assert draws() == inside


class Drawn(torch.utils.data.Sampler[list[int]]):
    """Batches in an order that generators of four kinds draw, and that depends on how often it was asked."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.python, self.old, self.new = random.Random(2), np.random.RandomState(3), np.random.default_rng(4)
        self.epoch, self._seen = 0, [0]

    def __iter__(self) -> Iterator[list[int]]:
        self.epoch += 1
        self._seen[0] += 1
        drawn = int(torch.randint(9, (1,), generator=self.generator)), self.python.randrange(9)
        for number in (*drawn, int(self.old.randint(9)), int(self.new.integers(9)), self.epoch, self._seen[0]):
            yield [number]


def test_a_loader_forgets_the_iterators_that_were_made_inside() -> None:
    loaders = [DataLoader(range(99), batch_sampler=Drawn()) for _ in range(2)]  # type: ignore[arg-type]
    expected = [[int(batch) for batch in loaders[0]] for _ in range(3)]
    assert expected[0] != expected[1]
    seen = [[int(batch) for batch in loaders[1]]]
    with preserved_loader(loaders[1]):
        assert [[int(batch) for batch in loaders[1]] for _ in range(2)] == expected[1:]
    seen += [[int(batch) for batch in loaders[1]] for _ in range(2)]
    assert seen == expected


def test_attributes_are_put_back_and_containers_of_others_keep_their_identity() -> None:
    metrics: Any = {"train": defaultdict(list)}
    data, model = [torch.zeros(9999)], torch.nn.Linear(2, 2)
    owner = SimpleNamespace(_metrics=metrics, _tokens=3, _data=data, model=model)
    with preserved_attributes(owner):
        owner._metrics["train"]["loss"].append(1.0)
        owner._tokens += 5
        owner.new = True
        owner.model = None
        assert owner._data is data
    assert vars(owner) == {"_metrics": metrics, "_tokens": 3, "_data": data, "model": model}
    assert owner._metrics is metrics and metrics == {"train": {}}


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "mols_0.pt").write_bytes(b"junk")
    with pytest.raises(MolsCheckpointError, match=r"mols_0\.pt cannot be read .*: resume from another checkpoint"):
        load_state(Handle(), tmp_path)
