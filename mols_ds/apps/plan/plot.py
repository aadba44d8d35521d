"""Plot the memory of a plan: one stacked bar per phase, and the usable memory as a line."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from mols_ds.apps.plan.parts import KINDS
from mols_ds.core.files import write_whole
from mols_ds.core.json_types import JsonMapping
from mols_ds.errors import MolsConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GIB = 2**30


def save(plan: JsonMapping, path: str) -> None:
    """Write the plot; the suffix selects the format. Raises MolsConfigError if it cannot be written."""
    try:
        figure = draw(plan)
    except ImportError as error:
        raise MolsConfigError("--plot needs matplotlib: pip install matplotlib") from error
    target = Path(path)
    try:
        write_whole(target, lambda beside: figure.savefig(beside, dpi=150, format=target.suffix[1:] or "png"))
    except (OSError, ValueError) as error:
        raise MolsConfigError(f"--plot {path}: {' '.join(str(error).split())}") from error


def draw(plan: JsonMapping) -> Figure:
    """Draw one panel for the accelerator, and one for the host if anything is there. Raises ImportError."""
    from matplotlib.figure import Figure  # without pyplot, which reads MPLBACKEND

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    both = any(phase["host"] for phase in plan["phases"])
    axes = figure.subplots(1, 2 if both else 1, squeeze=False)[0]
    for axis, where in zip(axes, ("device", "host"), strict=False):
        _bars(axis, plan, where)
    figure.suptitle(textwrap.fill(plan["run"]["summary"][0], 80), fontsize=9)
    drawn = dict(found for axis in axes for found in zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    names = [name for name in ("usable", *KINDS[::-1]) if name in drawn]  # in stacking order
    figure.legend([drawn[name] for name in names], names, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _bars(axis: Axes, plan: JsonMapping, where: str) -> None:
    phases = plan["phases"]
    names = [phase["phase"] for phase in phases]
    bottoms = [0.0] * len(phases)
    for number, kind in enumerate(KINDS):
        heights = [phase[where].get(kind, 0) / GIB for phase in phases]
        if any(heights):
            axis.bar(names, heights, bottom=bottoms, label=kind, color=f"C{number}", width=0.6)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axis.axhline(plan["limits"][where] / GIB, color="black", linestyle="--", label="usable")
    axis.set_ylabel("GiB of a rank")
    axis.set_title("accelerator" if where == "device" else "host")
