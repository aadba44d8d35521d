"""Megatron's sums for logging, which forward passes add to: losses of the routers and of multi-token prediction."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_patches.compat import TRACKERS
from mols_ds.core.module_state import Tracker


def trackers() -> Sequence[Tracker]:
    """Those of the modules of megatron.core that were imported; a model without them imports none."""
    found: list[Tracker] = []
    for name, path in TRACKERS:
        value: object = sys.modules.get(name)
        for attribute in path:
            value = getattr(value, attribute, None)
        if isinstance(value, dict):
            found.append(value)
    return found
