"""The catalog's facts about other packages' classes, checked with those classes: weight decay, Adam's moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mols_ds.core.adam_moments import moments_of
from mols_ds.errors import MolsUnsupportedError
from mols_ds.optim.catalog import class_facts
from mols_ds.optim.traits import has_adam_moments
from tests.helpers.decays import LR, Make, check_class

COLLECTED: dict[str, tuple[Callable[[Any], Make], bool]] = {
    "Lion": (lambda m: lambda p, wd: m.Lion(p, lr=LR, weight_decay=wd), True),
    "Lion, L2": (lambda m: lambda p, wd: m.Lion(p, lr=LR, weight_decay=wd, weight_decouple=False), False),
    "GaLore": (lambda m: lambda p, wd: m.GaLore(p, lr=LR, weight_decay=wd), True),
    "Muon": (lambda m: lambda p, wd: m.Muon([{"params": p, "use_muon": True}], lr=LR, weight_decay=wd), False),
    "SOAP": (lambda m: lambda p, wd: m.SOAP(p, lr=LR, weight_decay=wd), False),
    "Lamb": (lambda m: lambda p, wd: m.Lamb(p, lr=LR, weight_decay=wd), False),
    "LARS": (lambda m: lambda p, wd: m.LARS(p, lr=LR, weight_decay=wd), False),
    "Fira": (lambda m: lambda p, wd: m.Fira(p, lr=LR, weight_decay=wd), False),
    "AdaBelief": (lambda m: lambda p, wd: m.AdaBelief(p, lr=LR, weight_decay=wd), False),
}
"""Of pytorch-optimizer: how to build it, and whether its decay can stay that of the base rate."""


@pytest.mark.parametrize("name", COLLECTED)
def test_pytorch_optimizer(name: str) -> None:
    make, keeps = COLLECTED[name]
    check_class(make(pytest.importorskip("pytorch_optimizer")), keeps)


def test_bitsandbytes() -> None:
    module = pytest.importorskip("bitsandbytes").optim
    check_class(lambda p, wd: module.AdamW8bit(p, lr=LR, weight_decay=wd), True)


def test_a_decay_without_lr_is_refused() -> None:
    """It would be multiplied in some of a step's ranges and not in others."""
    make = pytest.importorskip("pytorch_optimizer").Lion
    for decay in (0.0, 0.1):
        optimizer = make([torch.nn.Parameter(torch.ones(2))], lr=LR, weight_decay=decay, fixed_decay=True)
        found = class_facts(optimizer).refusal(optimizer.param_groups)
        assert (found is not None) == bool(decay)
        assert found is None or "Lion with fixed_decay" in found[0]


@pytest.mark.parametrize("name", ["Fira", "Conda", "SPlus", "NovoGrad", "AdaMuon", "LARS", "CAME", "GaLore", "SOAP"])
def test_classes_without_adams_moments(name: str) -> None:
    """Some have two betas; some have state by Adam's names of another shape."""
    make = getattr(pytest.importorskip("pytorch_optimizer"), name)
    options = {"use_muon": True} if name == "AdaMuon" else {"rank": 2} if name in ("Fira", "Conda", "GaLore") else {}
    if name in ("Fira", "Conda", "GaLore"):
        options |= {"update_proj_gap": 9, "scale": 1.0, "projection_type": "std"}
    optimizer = make([{"params": [torch.nn.Parameter(torch.ones(6, 5))], **options}])
    assert not has_adam_moments(optimizer)


def test_a_class_that_is_not_known_is_found_out_at_the_first_reading() -> None:
    weight = torch.nn.Parameter(torch.ones(6, 5))
    optimizer = pytest.importorskip("pytorch_optimizer").AdaBelief([weight])
    weight.grad = torch.ones(6, 5)
    optimizer.step()
    with pytest.raises(MolsUnsupportedError, match="AdaBelief, whose state has no exp_avg_sq"):
        moments_of(optimizer, weight)
