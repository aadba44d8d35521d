"""The doctor refuses the optimizers that `mols_ds.initialize` refuses, each of them by a real engine."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

import mols_ds
from mols_ds.apps.doctor.deepspeed_config import check_config
from mols_ds.apps.doctor.findings import Findings
from mols_ds.errors import MolsConfigError, MolsUnsupportedError
from mols_ds.optim.catalog import ENTRIES, OPTIMIZERS
from tests.engines.deepspeed.engines import config
from tests.engines.deepspeed.models import model_of
from tests.helpers.harness import run_ranks

REFUSED = sorted(kind.name for entry in ENTRIES for kind in entry.classes if kind.refused)
TORCHS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)
NAMES = list(dict.fromkeys([*OPTIMIZERS, *TORCHS, *DEEPSPEED_OPTIMIZERS, *REFUSED]))
PARAMS: dict[str, dict[str, Any]] = {"adam": {"torch_adam": True}, "adamw": {"torch_adam": True}, "lbfgs": {}}
SECTION = {"start": 1, "samples": 4, "ramp_end": 8, "total_steps": 20}


def given(name: str, stage: int) -> dict[str, Any]:
    params = {"lr": 1e-3, **PARAMS.get(name.lower(), {})}
    return config(stage, SECTION, micros=1, optimizer={"type": name, "params": params})


def refusals() -> dict[str, tuple[str, str]]:
    """Name and stage -> (what `mols_ds.initialize` says, what the doctor says); "" = nothing. One rank."""
    found = {}
    for name in NAMES:
        for stage in (0, 2):
            content, model = given(name, stage), model_of()
            said = ""
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    mols_ds.initialize(model=model, model_parameters=model.parameters(), config=content)[0].destroy()
                except (MolsConfigError, MolsUnsupportedError) as error:
                    said = str(error)
                except Exception as error:  # kernels that a CPU has not, packages that are not installed
                    said = f"not built: {type(error).__name__}: {error}"
                findings = Findings()
                Path("ds.json").write_text(json.dumps(content), "utf-8")
                check_config(findings, "ds.json", model=None, steps=20, world=1)
            found[f"{name} {stage}"] = (said, "; ".join(f.found for f in findings.items if f.level == "problem"))
    return found


@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.tier("full")
def test_the_doctor_refuses_what_initialize_refuses() -> None:
    (found,) = run_ranks(refusals, 1, timeout=600)
    differ = {
        key: both
        for key, both in found.items()
        if not both[0].startswith("not built") and bool(both[0]) != bool(both[1])
    }
    assert not differ, differ
    assert sum(said.startswith("MoLS does not support") for said, _ in found.values()) > 2 * len(REFUSED)
