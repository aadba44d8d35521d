"""Plot SNR and learning rates of the module groups over a run. Needs matplotlib (extra `report`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mols_ds.core.layout import base_group
from mols_ds.report.plot import COLOURS, FAINT

FROM_MOMENTS = "lines: from Adam's moments; moving weights count as noise, rows of unseen tokens are included"
Line = Mapping[str, Any]
"""A line of metrics.jsonl."""


def draw_run(lines: Sequence[Line], title: str) -> Figure:
    """Draw the applied rate of each group, and its SNR: at each calibration (points) and from Adam's moments (lines).

    Args:
        lines: of metrics.jsonl, in the order of the steps.
        title: of the figure.
    """
    figure = Figure(figsize=(11.0, 4.6), facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=12.5, fontweight="bold", x=0.012, ha="left")
    rates, snr = figure.subplots(1, 2)
    for group, (steps, values) in curves(lines, "applied_lrs").items():
        rates.plot(steps, values, color=_colour(group), label=group, linewidth=1.2)
    base = [(line["step"], line["lr"]) for line in lines if line.get("lr", 0) > 0]
    if base:
        rates.plot(*zip(*base, strict=True), color="#222222", linestyle=":", label="base rate")
    for group, (steps, values) in curves(lines, "snr_moments").items():
        snr.plot(steps, values, color=_colour(group), label=group, linewidth=1.2)
    for group, (steps, values) in curves(lines, "snr").items():
        snr.plot(steps, values, color=_colour(group), marker="o", linestyle="", label=f"{group}, calibration")
    _finish(rates, "applied learning rate")
    _finish(snr, "SNR (damping: d)")
    if curves(lines, "snr_moments"):
        snr.set_title(FROM_MOMENTS, fontsize=8.5, loc="left")
    return figure


def curves(lines: Iterable[Line], key: str) -> dict[str, tuple[list[int], list[float]]]:
    """Return steps and positive values of each group under one key of the lines."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        for group, value in line.get(key, {}).items():
            if value is not None and value > 0:
                steps, values = found.setdefault(group, ([], []))
                steps.append(line["step"])
                values.append(value)
    return found


def _colour(group: str) -> str:
    return COLOURS.get(base_group(group), "#7F7F7F")


def _finish(axes: Axes, label: str) -> None:
    axes.set(xlabel="step", ylabel=label)
    if axes.lines:
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.grid(color=FAINT)
