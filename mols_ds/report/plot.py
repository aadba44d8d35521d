"""Plots of a calibration report and of a whole run, drawn off screen. Needs matplotlib (extra `report`), not pyplot."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from mols_ds.core.layout import base_group
from mols_ds.core.schema import Number, Report, ReportGroup
from mols_ds.report.table import MAX_ROWS, group_cells, headline, statistic_name

# Palette of Okabe and Ito: readable for colour-blind people and in grey.
COLOURS = {
    "embedding": "#0072B2",
    "head": "#D55E00",
    "qk": "#009E73",
    "vo": "#CC79A7",
    "mlp": "#E69F00",
    "other": "#7F7F7F",
}
INK, FAINT = "#222222", "#DDDDDD"
FROM_MOMENTS = "lines: from Adam's moments; moving weights count as noise, rows of unseen tokens are included"


def draw_report(report: Report) -> Figure:
    """Draw three panels: the statistic of each group with its 95 % interval, the alphas, and the group table.

    Up to `MAX_ROWS` groups get one row each; more (granularity `layer_type`) are drawn as lines over the layers.
    The figure has no window and no global state.
    """
    cells = group_cells(report)
    groups = report["groups"]
    layered = len(groups) > MAX_ROWS
    upper = 3.4 if layered else 1.0 + 0.36 * len(groups)
    lower = 0.5 + 0.27 * len(cells)
    spacing = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)
    figure = Figure(figsize=(11.0, upper + lower + 1.1), facecolor="white", layout=spacing)
    figure.suptitle(
        textwrap.fill(headline(report), 95), fontsize=12.5, fontweight="bold", color=INK, x=0.012, ha="left"
    )
    grid = figure.add_gridspec(2, 2, height_ratios=[upper, lower], width_ratios=[1.25, 1.0])
    left, right = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    statistic = "effective step d" if statistic_name(report) == "d" else "gradient SNR"
    if layered:
        _lines(left, groups, "snr", f"{statistic} ({report['estimator']})")
        _lines(right, groups, "alpha", "learning-rate multiplier alpha")
        left.legend(frameon=False, fontsize=8, ncols=6, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderpad=0.0)
    else:
        _intervals(left, groups, f"{statistic} ({report['estimator']}), 95 % interval")
        _alphas(right, groups, report["reference"])
    _table(figure.add_subplot(grid[1, :]), cells)
    figure.supxlabel(textwrap.fill(_footnote(report), 190), fontsize=7.5, color="#777777", x=0.012, ha="left")
    return figure


def _intervals(axes: Axes, groups: Mapping[str, ReportGroup], label: str) -> None:
    """Draw one dot per group on a logarithmic axis. Values of zero and less are drawn at its left edge as `<`."""
    ends = [group[key] for group in groups.values() for key in ("snr", "snr_low", "snr_high")]
    positive = [end for end in ends if end is not None and end > 0]
    least, greatest = (min(positive) / 1.6, max(positive) * 1.6) if positive else (0.1, 10.0)
    for row, (name, group) in enumerate(groups.items()):
        value, low, high = group["snr"], group["snr_low"], group["snr_high"]
        colour = colour_of(name)
        if value is None:
            why = "no element moved" if group["never_moved_share"] == 1.0 else "not measured"
            axes.text(0.02, row, why, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
            continue
        if low is not None and high is not None and high > 0:
            axes.plot([max(low, least), high], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt")
            caps = [end for end in (low, high) if end > 0]
            axes.plot(caps, [row] * len(caps), "|", color=colour, markersize=14, markeredgewidth=1.6)
        marker = "o" if value > 0 else "<"
        axes.plot(max(value, least), row, marker, color=colour, markersize=8, clip_on=False)
    axes.set_xscale("log")
    axes.set_xlim(least, greatest)
    log_ticks(axes.xaxis, greatest / least)
    _names(axes, groups)
    axes.set_xlabel(label, fontsize=9.5)


def _alphas(axes: Axes, groups: Mapping[str, ReportGroup], reference: str) -> None:
    """Draw bars from 1 on a logarithmic axis, so that halving and doubling look alike. Clamped ones are hatched."""
    ends = [
        end for group in groups.values() for end in (group["alpha"], group.get("alpha_low"), group.get("alpha_high"))
    ]
    known = [end for end in ends if end]
    reach = max([1.5, *(max(alpha, 1 / alpha) for alpha in known)])
    for row, (name, group) in enumerate(groups.items()):
        alpha = group["alpha"]
        if not alpha:
            continue
        axes.barh(
            row,
            alpha - 1,
            left=1,
            height=0.62,
            color=colour_of(name),
            hatch="////" if group["clamped"] else None,
            edgecolor="white",
            linewidth=0,
        )
        low, high = group.get("alpha_low"), group.get("alpha_high")
        if low and high and name != reference and not group["clamped"]:
            axes.plot([low, high], [row, row], color=INK, linewidth=1.2)
        sign = -1 if alpha < 1 else 1
        note = " clamped" if group["clamped"] else (" reference" if name == reference else "")
        axes.annotate(
            f"{alpha:.2f}{note}",
            (max(alpha, high or alpha) if sign > 0 else min(alpha, low or alpha), row),
            xytext=(5 * sign, 0),
            textcoords="offset points",
            va="center",
            ha="right" if sign < 0 else "left",
            fontsize=9,
            color=INK,
        )
    axes.axvline(1.0, color=INK, linewidth=1.0)
    axes.set_xscale("log")
    least = min([1.0, *known])
    # Leave room for the numbers: a share of the axis length beyond the outermost bars.
    axes.set_xlim(least / reach**0.45 if least < 1 else 1 / reach**0.12, max([1.0, *known]) * reach**0.62)
    log_ticks(axes.xaxis, reach)
    _names(axes, groups)
    axes.set_xlabel("learning-rate multiplier alpha" + (", 95 % interval" if any(ends[1::3]) else ""), fontsize=9.5)


def _lines(axes: Axes, groups: Mapping[str, ReportGroup], key: Number, label: str) -> None:
    """Draw one line per kind of group over the layer index. Kinds without layers are a dashed level."""
    series: dict[str, list[tuple[int, float]]] = {}
    for name, group in groups.items():
        kind = base_group(name)
        layer = name.removeprefix(kind).removeprefix(".")
        value = group[key]
        if value is not None and value > 0:
            series.setdefault(kind, []).append((int(layer) if layer else -1, value))
    for kind, points in series.items():
        if points[0][0] < 0:
            axes.axhline(points[0][1], color=colour_of(kind), linestyle="--", linewidth=1.4, label=kind)
        else:
            layers, values = zip(*sorted(points), strict=True)
            axes.plot(layers, values, "o-", color=colour_of(kind), linewidth=1.6, markersize=3.5, label=kind)
    axes.set_yscale("log")
    least, greatest = axes.get_ylim()
    log_ticks(axes.yaxis, greatest / least)
    axes.set_xlabel("layer", fontsize=9.5)
    axes.set_ylabel(label, fontsize=9.5)
    frame(axes, "y", hidden=("top", "right", "bottom"))


def _table(axes: Axes, cells: list[list[str]]) -> None:
    axes.axis("off")
    count = len(cells[0])
    widths = [max(len(row[i]) for row in cells) + 4 for i in range(count)]
    table = axes.table(
        cellText=cells,
        colWidths=[width / sum(widths) for width in widths],
        bbox=Bbox.unit(),
        edges="horizontal",
    )
    table.auto_set_font_size(False)
    for (row, column), cell in table.get_celld().items():
        text = cell.get_text()
        text.set_fontsize(9)
        text.set_color(INK)
        text.set_horizontalalignment("left" if column in (0, count - 1) else "right")
        cell.PAD = 0.04
        cell.set_edgecolor(INK if row == 0 else FAINT)
        cell.set_linewidth(0.8)
        if row == 0:
            text.set_fontweight("bold")


def _names(axes: Axes, groups: Mapping[str, ReportGroup]) -> None:
    axes.set_yticks(range(len(groups)), list(groups), fontsize=10)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, pad=9)
    frame(axes, "x", hidden=("top", "right", "left"))


def frame(axes: Axes, lines: Literal["x", "y", "both"], hidden: Sequence[str] = ("top", "right")) -> None:
    """Draw grid lines below the data, and no frame on the `hidden` sides."""
    axes.grid(axis=lines, which="major", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", labelsize=9)
    axes.spines[list(hidden)].set_visible(False)


def log_ticks(axis: Axis, ratio: float) -> None:
    """Set plain numbers as ticks instead of powers of ten: several per decade if there are few decades."""
    decades = math.log10(max(ratio, 1.0001))
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 0.8 else (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _footnote(report: Report) -> str:
    world = [f"{key} ranks {value}" for key, value in report["world"].items() if value]
    versions = [f"{name} {version}" for name, version in report["versions"].items()]
    return "   ·   ".join([*world, *versions])


def colour_of(group: str) -> str:
    """Return the colour of a group: `qk.3` has that of `qk`, an unknown group that of `other`."""
    return COLOURS.get(group.split(".", 1)[0], COLOURS["other"])


# ---------------------------------------------------------------------- a whole run

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
        rates.plot(steps, values, color=colour_of(group), label=group, linewidth=1.2)
    base = [(line["step"], line["lr"]) for line in lines if line.get("lr", 0) > 0]
    if base:
        rates.plot(*zip(*base, strict=True), color="#222222", linestyle=":", label="base rate")
    for group, (steps, values) in curves(lines, "snr_moments").items():
        snr.plot(steps, values, color=colour_of(group), label=group, linewidth=1.2)
    for group, (steps, values) in curves(lines, "snr").items():
        snr.plot(steps, values, color=colour_of(group), marker="o", linestyle="", label=f"{group}, calibration")
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


def _finish(axes: Axes, label: str) -> None:
    axes.set(xlabel="step", ylabel=label)
    if axes.lines:
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.grid(color=FAINT)
