"""Formats of numbers in the tables of a study's report: losses with four decimals, perplexities with two."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import PurePath

from mols_ds.apps.study.curves import Band
from mols_ds.apps.study.paired import Difference
from mols_ds.apps.study.relative import RelativeCost
from mols_ds.apps.study.summary import ArmRow


def loss_text(value: float | None) -> str:
    """Format with four decimals; `diverged` for infinity, `-` for None."""
    return "-" if value is None else f"{value:.4f}" if math.isfinite(value) else "diverged"


def difference_text(value: Difference | None) -> str:
    """Format as `-0.0969 [-0.1235, -0.0702]`; bold if the interval excludes zero."""
    if value is None:
        return "-"
    if not math.isfinite(value.mean):
        return "baseline diverged" if not value.mean > 0 else "diverged"
    if value.low is None or value.high is None:
        return f"{value.mean:+.4f}"
    text = f"{value.mean:+.4f} [{value.low:+.4f}, {value.high:+.4f}]"
    return f"**{text}**" if value.clear else text


def p_text(value: float | None) -> str:
    """Format with three decimals."""
    return "-" if value is None else "< 0.001" if value < 0.0005 else f"{value:.3f}"


def perplexity_text(value: Band | None) -> str:
    """Format the mean, with the smallest and largest seed."""
    if value is None:
        return "-"
    low, high = (f"{end:.2f}" if math.isfinite(end) else "inf" for end in value[1:])
    return f"{value.mean:.2f} ({low} to {high})" if math.isfinite(value.mean) else f"diverged ({low} to {high})"


def speed_up_text(row: ArmRow) -> str:
    """Format as `1.31`, in brackets the value with measuring passes charged; `-` if the arm never reaches the loss."""
    if row.speed_up is None or row.speed_up_charged is None:
        return "-"
    charged = f" ({row.speed_up_charged:.2f})" if row.speed_up_charged != row.speed_up else ""
    return f"{row.speed_up:.2f}{charged}"


def step_text(cost: RelativeCost) -> str:
    """Format the median ratio with quartiles; `~` if the engines did not take turns."""
    if cost.step is None:
        return "-"
    middle, low, high = cost.step
    return f"{'' if cost.in_turns else '~'}{middle:.2f} [{low:.2f}, {high:.2f}]"


def memory_text(cost: RelativeCost) -> str:
    """Format the ratio, and the MiB that MoLS adds during the measurement."""
    if cost.memory_ratio is None:
        return "-"
    more = f" (+{cost.accumulators / 2**20:.1f} MiB)" if cost.accumulators else ""
    return f"{cost.memory_ratio:.2f}{more}"


def alpha_text(value: Band | None) -> str:
    """Format three digits, with the range unless it is a point."""
    if value is None:
        return "-"
    middle, low, high = (f"{number:#.3g}".rstrip(".") for number in value)
    return middle if low == high else f"{middle} [{low}, {high}]"


def compact(value: object) -> str:
    """Format a setting in one line; empty if it is not set. An absolute path is cut to its name."""
    if value is None or value == {} or value == [] or value == "":
        return ""
    if isinstance(value, str):
        return PurePath(value).name if PurePath(value).is_absolute() else value
    if isinstance(value, Mapping):
        value = {
            key: compact(item) if isinstance(item, str) else item for key, item in value.items() if item is not None
        }
    return json.dumps(value)
