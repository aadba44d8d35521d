"""Temporary copies of a scaled step: old values of the weights that it corrects (`mols_ds.core.lr_scaler`).

Optimizers that step on views of long segments need none. The copied elements depend on the multipliers, which are
unknown before the calibration: these are upper bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mols_ds.apps.plan.optimizers import Weight
from mols_ds.core.layout import ElementLayout, base_group, is_scaled
from mols_ds.core.lr_scaler import is_interleaved
from mols_ds.optim.catalog import row_of

COPY_BYTES = 4
"""Bytes per element: the stepped weights are fp32."""


def steps_on_views(optimizer: str) -> bool:
    """Return True if the optimizer with this name may be stepped on views of its tensors."""
    row = row_of(optimizer)
    return row is not None and any(kind.elementwise_in for kind in row.classes)


def held_of_tensor(layout: ElementLayout, numel: int, reference: str, *, views: bool) -> int:
    """Return the most elements that are copied of a parameter with its own tensor."""
    counts = layout.counts(0, numel)
    if len(counts) < 2:
        return 0
    if is_interleaved(layout, numel, elementwise=views):
        return numel - min(counts.values())  # all but the elements with the largest multiplier
    return 0 if views else _scaled(counts, reference)


def held_of_shard(weights: Iterable[Weight], layouts: Mapping[str, ElementLayout], reference: str, views: bool) -> int:
    """Return the most elements that are copied of parameters in one flat tensor."""
    if views:
        return sum(held_of_tensor(layouts[w.name], w.numel, reference, views=True) for w in weights)
    return sum(_scaled(layouts[w.name].counts(0, w.numel), reference) for w in weights)


def _scaled(counts: Mapping[str, int], reference: str) -> int:
    """Count the elements whose multiplier may differ from 1."""
    return sum(count for group, count in counts.items() if is_scaled(group) and base_group(group) != reference)
