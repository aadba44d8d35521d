"""Build the `LRScaler` of an optimizer from what the catalog says about its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch.optim import Optimizer

from mols_ds.core.lr_scaler import LRScaler, SegmentPlan
from mols_ds.optim.traits import has_shared_counter, is_elementwise, parallel_list, reads_groups_only, unscaled_decay


def lr_scaler(
    optimizer: Optimizer,
    plans: Mapping[int, SegmentPlan],
    multipliers: Callable[[], Mapping[str, float]],
    weight_decay: str,
) -> LRScaler:
    """Scale the rates of an inner optimizer from now on.

    Args:
        optimizer, plans, multipliers: as `LRScaler`.
        weight_decay: "mols.weight_decay".
    """
    return LRScaler(
        optimizer,
        plans,
        multipliers,
        elementwise=is_elementwise(optimizer),
        shared_counter=has_shared_counter(optimizer),
        groups_only=reads_groups_only(optimizer),
        parallel_list=parallel_list(optimizer),
        unscaled_decay=unscaled_decay(optimizer, weight_decay),
    )
