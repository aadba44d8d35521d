"""What a scaled step holds for a moment: the old values of the weights that it corrects (`mols_ds.core.lr_scaler`).

Nothing where the optimizer may be stepped on views of long segments. Which elements are held depends on the
multipliers, which are not known before the calibration: these are upper bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mols_ds.apps.plan.optimizers import Weight
from mols_ds.core.layout import ElementLayout, base_group, is_scaled
from mols_ds.core.lr_scaler import is_interleaved
from mols_ds.optim.catalog import row_of

COPY_BYTES = 4
"""Of an element: what is stepped are fp32 weights."""


def steps_on_views(optimizer: str) -> bool:
    """Whether an optimizer by this name may be stepped on views of its tensors."""
    row = row_of(optimizer)
    return row is not None and any(kind.elementwise_in for kind in row.classes)


def held_of_tensor(layout: ElementLayout, numel: int, reference: str, *, views: bool) -> int:
    """Elements that are held at most of a parameter that is a tensor of its own."""
    counts = layout.counts(0, numel)
    if len(counts) < 2:
        return 0
    if is_interleaved(layout, numel, elementwise=views):
        return numel - min(counts.values())  # all but those of the largest multiplier
    return 0 if views else _scaled(counts, reference)


def held_of_shard(weights: Iterable[Weight], layouts: Mapping[str, ElementLayout], reference: str, views: bool) -> int:
    """Elements that are held at most of parameters that lie in one flat tensor."""
    if views:
        return sum(held_of_tensor(layouts[w.name], w.numel, reference, views=True) for w in weights)
    return sum(_scaled(layouts[w.name].counts(0, w.numel), reference) for w in weights)


def _scaled(counts: Mapping[str, int], reference: str) -> int:
    """Elements whose multiplier need not be 1."""
    return sum(count for group, count in counts.items() if is_scaled(group) and base_group(group) != reference)
