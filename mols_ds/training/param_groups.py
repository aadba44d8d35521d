"""Settings of an optimizer's parameter groups that a loaded checkpoint replaces, such as betas and weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Group = dict[str, Any]
COUNTED = ("params", "lr", "initial_lr", "step")
"""Keys that are no settings: the scheduler sets the rates, the optimizer counts steps."""


def group_options(groups: Sequence[Group]) -> list[Group]:
    """Return the settings of each parameter group."""
    return [{key: value for key, value in group.items() if key not in COUNTED} for group in groups]


def restore_options(groups: Sequence[Group], options: Sequence[Group]) -> None:
    """Write the settings of `group_options` back."""
    for group, own in zip(groups, options, strict=True):
        group.update(own)
