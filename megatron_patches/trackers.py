"""Megatron's sums for logging, updated in forward passes: losses of routers and of multi-token prediction."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_patches.compat import TRACKERS
from mols_ds.core.module_state import Tracker


def trackers() -> Sequence[Tracker]:
    """Return the trackers of the imported modules of megatron.core. Does not import any module."""
    found: list[Tracker] = []
    for name, path in TRACKERS:
        value: object = sys.modules.get(name)
        for attribute in path:
            value = getattr(value, attribute, None)
        if isinstance(value, dict):
            found.append(value)
    return found
