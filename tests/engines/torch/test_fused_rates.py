"""A fused DTensor is scaled at its local rows: indices of the whole tensor would be silently wrong on every rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mols_ds.core.layout import ElementLayout
from mols_ds.core.lr_scaler import LRScaler, make_plan
from mols_ds.core.ranges import ShardRange
from tests.helpers.harness import run_ranks

ROWS, COLUMNS = 8, 4
LAYOUT = ElementLayout(COLUMNS, ((2, "qk"), (2, "vo")))
RATES = {"qk": 2.0, "vo": 3.0}


def stepped() -> list[list[float]]:
    """The whole weights after a step of SGD at rate 1 with gradients of -1."""
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.zeros(ROWS, COLUMNS), mesh, [Shard(0)]))
    weight.grad = distribute_tensor(-torch.ones(ROWS, COLUMNS), mesh, [Shard(0)])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    numel = weight.to_local().numel()
    start = mesh.get_local_rank() * numel
    plan = make_plan(numel, [ShardRange("w", start, 0, numel)], {"w": LAYOUT}, elementwise=True)
    LRScaler(optimizer, {id(weight): plan}, lambda: RATES, elementwise=True)
    optimizer.step()
    return weight.full_tensor().detach().tolist()


@pytest.mark.distributed
def test_each_local_row_gets_the_rate_of_its_group() -> None:
    expected = [[RATES["qk" if row % 4 < 2 else "vo"]] * COLUMNS for row in range(ROWS)]
    assert run_ranks(stepped, 2, timeout=60) == [expected, expected]
