"""Refusals for the sake of a mode: not with `fixed_alphas`, which measure nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mols_ds.core.config import MolsConfig
from mols_ds.engines.deepspeed.checks import _engine_refusals


def refused(section: dict[str, Any]) -> list[str]:
    engine: Any = SimpleNamespace(
        config={},
        module=torch.nn.Module(),
        managed_gradient_accumulation=lambda: False,
        zero_optimization=lambda: True,
        zero_compute_grad_norm=lambda: False,
    )
    return [what for refuse, what, _ in _engine_refusals(engine, MolsConfig.parse(section)) if refuse]


@pytest.mark.parametrize(("mode", "setting"), [("probe", "managed_gradient"), ("online", "compute_grad_norm")])
def test_a_mode_that_is_not_used_refuses_nothing(mode: str, setting: str) -> None:
    (what,) = refused({"mode": mode})
    assert setting in what
    assert refused({"mode": mode, "fixed_alphas": {"vo": 2.0}}) == []
