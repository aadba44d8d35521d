"""Settings that differ from the checkpoint's: the value that applies, and the message."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mols_ds.core.config import MolsConfig
from mols_ds.core.phases import Phase
from mols_ds.core.resume_rules import RULES, changed, section_of

CHANGES: dict[str, Any] = {
    "start": 7,
    "samples": 16,
    "max_samples": 64,
    "alpha_rtol": 0.2,
    "mode": "online",
    "estimator": "median",
    "noise_floor_correction": False,
    "unseen_rows": "include",
    "reference": "mlp",
    "alpha_min": 0.5,
    "alpha_max": 1.01,
    "factors": {"embedding": 2.0},
    "ramp": "cosine",
    "ramp_end": 90,
    "accumulators": {"device": "accelerator"},
    "recalibrate": {"every": 5},
    "weight_decay": "unscaled",
    "total_steps": 500,
    "report_dir": "elsewhere",
}
BASE = {"start": 1, "ramp_end": 50}


def test_every_key_of_the_section_has_a_rule() -> None:
    assert RULES.keys() == MolsConfig.model_fields.keys()
    assert {key for key, rule in RULES.items() if rule != "elsewhere"} == CHANGES.keys()


@pytest.mark.parametrize("key", CHANGES)
@pytest.mark.parametrize("phase", ["waiting", "calibrating", "ramping", "fixed"])
def test_each_key_that_differs_is_said_once(key: str, phase: Phase) -> None:
    saved = json.loads(json.dumps(section_of(MolsConfig.parse(BASE))))
    kept, applied = changed(saved, MolsConfig.parse({**BASE, key: CHANGES[key]}), phase)
    (line,) = kept + applied
    assert line.startswith(f"mols.{key} is ") and "\n" not in line
    wins = {"config": False, "begun": phase != "waiting", "alphas": phase in ("ramping", "fixed")}
    assert bool(kept) is wins[RULES[key]]


@pytest.mark.parametrize("saved", [None, {}, {"samples": 32}])
def test_factors_are_new_to_checkpoints_that_lack_the_key(saved: object) -> None:
    kept, applied = changed(saved, MolsConfig.parse({**BASE, "factors": {"embedding": 2.0}}), "fixed")
    assert applied == [] and len(kept) == 1 and kept[0].startswith("mols.factors is {'embedding': 2.0} and was None")


@pytest.mark.parametrize("saved", [None, {}, [], section_of(MolsConfig.parse(BASE))])
def test_nothing_to_say(saved: object) -> None:
    """Checkpoints of 0.4.0 have no section."""
    assert changed(saved, MolsConfig.parse(BASE), "fixed") == ([], [])
