"""Real optimizers with Adam's two moments per element, as in the catalog, and the messages for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mols_ds.core.adam_moments import SteadyBetas
from mols_ds.core.session import _moments_of
from mols_ds.errors import MolsUnsupportedError
from mols_ds.optim.apollo import Apollo
from mols_ds.optim.lamb import ShardedLamb
from mols_ds.optim.sgg import SGG
from mols_ds.optim.traits import has_adam_moments

KEEP: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    **{name: getattr(torch.optim, name) for name in ("Adam", "AdamW", "NAdam", "RAdam")},
    "amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "ShardedLamb": ShardedLamb,
    "SGG": SGG,
}
OTHER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    **{name: getattr(torch.optim, name) for name in ("Adamax", "Adagrad", "RMSprop", "Adadelta", "Muon")},
    "SGD": lambda p: torch.optim.SGD(p, momentum=0.9),
    "Apollo": lambda p: Apollo([{"params": p, "rank": 2, "update_proj_gap": 9, "scale": 1.0, "scale_type": "channel"}]),
}


def stepped(make: Callable[[Any], torch.optim.Optimizer]) -> tuple[torch.optim.Optimizer, torch.Tensor]:
    weight = torch.nn.Parameter(torch.ones(6, 5))
    optimizer = make([weight])
    weight.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    return optimizer, weight


@pytest.mark.parametrize("name", KEEP)
def test_adams_moments_are_there_and_are_read(name: str) -> None:
    optimizer, weight = stepped(KEEP[name])
    assert has_adam_moments(optimizer)
    state = _moments_of(optimizer, weight)
    assert weight.grad is not None
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    torch.testing.assert_close(state["exp_avg"], (1 - beta1) * weight.grad)
    torch.testing.assert_close(state["exp_avg_sq"], (1 - beta2) * weight.grad**2)
    assert _moments_of(optimizer, torch.nn.Parameter(torch.ones(2))) == {}, "never stepped"


@pytest.mark.parametrize("name", OTHER)
def test_other_state_is_refused_at_attach_and_where_it_is_read(name: str) -> None:
    optimizer, weight = stepped(OTHER[name])
    assert not has_adam_moments(optimizer)
    with pytest.raises(
        MolsUnsupportedError, match=rf'mode "moments" with {type(optimizer).__name__}.*"probe"'
    ) as caught:
        _moments_of(optimizer, weight)
    assert "\n" not in str(caught.value)


def test_betas_that_changed_long_before_do_not_matter() -> None:
    betas = SteadyBetas()
    for step in range(1, 30):
        betas.see([{"betas": (0.9, 0.8 if step > 3 else 0.7)}, {"params": []}], step)
        assert step > 3 or betas.steady(step)
    assert not betas.steady(29) and betas.steady(4 + 44)
