"""Figures of a study's report. Needs matplotlib (extra `report`); draws off screen, without pyplot's state."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

from mols_ds.apps.study.curves import Band
from mols_ds.apps.study.document import Picture
from mols_ds.apps.study.summary import AlphaRow, ArmRow, Summary, group_order
from mols_ds.report.plot import INK, colour_of, frame, log_ticks

# Palette of Okabe and Ito, without black (the baseline's) and yellow (too light for lines).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.4)), (0, (6, 1.6, 1.2, 1.6)))
MARKERS = "osD^vPX*"
OUTLIER = 5.0
"""Draw differences above this many times the median as arrows at the edge, so that the others stay readable."""
MAX_BANDS = 8
"""With more arms than this, only the curve of the baseline has a band over seeds."""
TITLE = 26
"""Characters per line above a panel."""
MAX_TICKS = 12
"""Label each rate on the axis up to this number of rates."""
GAP = Band(math.nan, math.nan, math.nan)
Drawn = tuple[Picture, Figure]


class Style(NamedTuple):
    """Line style of an arm in every figure."""

    colour: str
    dash: Any
    marker: str


def arm_styles(arms: Sequence[str], baseline: str) -> dict[str, Style]:
    """Return a distinct style for each of up to 28 arms; the baseline is black. `lion+mols` has the colour of `lion`.

    The family of an arm is its name up to the first `+`. A family of more than four continues with the next colour.
    """
    styles = {baseline: Style(INK, "-", "o")}
    colours: dict[str, int] = {}
    used: dict[int, int] = {}
    for arm in arms:
        if arm == baseline:
            continue
        family = arm.split("+", 1)[0]
        colour = colours.get(family)
        if colour is None or used[colour] >= len(DASHES):
            colour = colours[family] = min(range(len(PALETTE)), key=lambda index: (used.get(index, 0), index))
        number = used.get(colour, 0)
        used[colour] = number + 1
        marker = MARKERS[(number + 2 * (number // len(DASHES)) + colour) % len(MARKERS)]
        styles[arm] = Style(PALETTE[colour], DASHES[number % len(DASHES)], marker)
    return styles


def draw(summary: Summary) -> Iterator[Drawn]:
    """Draw every figure that has data, with its caption."""
    styles = arm_styles(summary.arms, summary.baseline)
    if any(row.difference is not None for row in summary.rows):
        yield _forest(summary)
    for model in summary.models:
        if any(row.curve.tokens for row in summary.of(model)):
            yield _curves(summary, model, styles)
    for model in summary.models:
        if summary.sensitivity.get(model):
            yield _sensitivity(summary, model, styles)
    for model in summary.snr:
        yield _snr(summary, model)
    if summary.alphas:
        yield _alphas(summary)


# ---------------------------------------------------------------------- differences to the baseline


def _forest(summary: Summary) -> Drawn:
    arms = [arm for arm in summary.arms if any(r.arm == arm and r.difference for r in summary.rows)]
    columns = min(3, len(summary.models))
    lines = math.ceil(len(summary.models) / columns)
    names = max(2.4, 0.8 + 0.08 * max(map(len, arms)))
    figure = _figure(names + 3.6 * columns, lines * (1.3 + 0.32 * len(arms)))
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes, model in zip(grid.flat, summary.models, strict=False):
        _forest_panel(axes, model, arms, {row.arm: row for row in summary.of(model)})
    for axes in grid.flat[len(summary.models) :]:
        axes.set_visible(False)
    grid[0, 0].set_yticks(range(len(arms)), arms)
    grid[0, 0].set_ylim(len(arms) - 0.4, -0.6)
    caption = (
        f"Final validation loss of every arm minus that of {summary.baseline}, paired by seed, with 95 % intervals; "
        "left of zero is better. Coloured: the interval excludes zero. Arrows: outside the picture."
    )
    return Picture("forest.png", "Differences to the baseline", caption), figure


def _forest_panel(axes: Axes, model: str, arms: Sequence[str], rows: Mapping[str, ArmRow]) -> None:
    reach = _reach([row for row in rows.values() if row.difference is not None])
    axes.axvline(0.0, color=INK, linewidth=1.0)
    axes.set_xlim(-reach * 1.08, reach * 1.08)
    for place, arm in enumerate(arms):
        difference = rows[arm].difference if arm in rows else None
        if difference is None or not math.isfinite(difference.mean):
            text = "not run" if arm not in rows or not rows[arm].losses else "no seed in common"
            if difference is not None:
                text = "diverged" if difference.mean > 0 else "baseline diverged"
            axes.text(0.0, place, f" {text}", va="center", fontsize=8, color="#777777")
            continue
        colour = ("#0072B2" if difference.mean < 0 else "#D55E00") if difference.clear else "#7F7F7F"
        if abs(difference.mean) > reach:
            side = math.copysign(reach, difference.mean)
            axes.plot(side, place, ">" if side > 0 else "<", color=colour, markersize=7)
            align = "right" if side > 0 else "left"
            axes.text(side * 0.95, place, f"{difference.mean:+.3f}", va="center", ha=align, fontsize=8, color=colour)
            continue
        if difference.low is not None and difference.high is not None:
            axes.plot([difference.low, difference.high], [place, place], color=colour, linewidth=1.8)
        axes.plot(difference.mean, place, "o", color=colour, markersize=6)
    _title(axes, model)
    axes.set_xlabel("loss minus the baseline's (nats per token)", fontsize=9)
    frame(axes, "x")


def _reach(rows: Sequence[ArmRow]) -> float:
    """Return half the width of a forest panel: the farthest interval end that is not an outlier."""
    found = [row.difference for row in rows if row.difference and math.isfinite(row.difference.mean)]
    ends = [max(abs(d.mean), abs(d.low or 0.0), abs(d.high or 0.0)) for d in found]
    if not any(ends):
        return 0.01
    limit = OUTLIER * statistics.median(ends)
    return max((end for end in ends if end <= limit), default=max(ends)) or max(ends)


# ---------------------------------------------------------------------- curves over tokens and rates


def _curves(summary: Summary, model: str, styles: Mapping[str, Style]) -> Drawn:
    rows = [row for row in summary.of(model) if row.curve.tokens]
    figure = _figure(12.5, max(4.4, 1.2 + 0.21 * len(rows)))
    whole, end = figure.subplots(1, 2)
    last = max(row.curve.tokens[-1] for row in rows)
    for row in rows:
        style = styles[row.arm]
        points = [(t, p) for t, p in zip(row.curve.tokens, row.curve.loss, strict=True) if math.isfinite(p.mean)]
        tokens = [t for t, _ in points]
        banded = len(rows) <= MAX_BANDS or row.baseline
        for axes in (whole, end):
            axes.plot(tokens, [p.mean for _, p in points], color=style.colour, linestyle=style.dash, linewidth=1.5)
            if banded:
                lows, highs = [p.low for _, p in points], [p.high for _, p in points]
                axes.fill_between(tokens, lows, highs, color=style.colour, alpha=0.1, linewidth=0)
    _limit_y(whole, [p.mean for row in rows for p in row.curve.loss])
    late = [p for row in rows for t, p in zip(row.curve.tokens, row.curve.loss, strict=True) if t >= last / 2]
    end.set_xlim(last / 2, last * 1.01)
    _limit_y(end, [value for p in late for value in (p.low, p.mean)], share=0.9)
    base = next((row.mean for row in rows if row.baseline), None)
    if base is not None and math.isfinite(base):
        end.axhline(base, color=INK, linewidth=0.9, linestyle=":")
    for axes, title in ((whole, "whole run"), (end, "second half")):
        _title(axes, title)
        axes.set_xlabel("tokens trained on", fontsize=9.5)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        frame(axes, "both")
    whole.set_ylabel("validation loss, mean of seeds (nats per token)", fontsize=9.5)
    _legend(figure, [row.arm for row in rows], styles, markers=False)
    whose = "" if len(rows) <= MAX_BANDS else f" (only for {summary.baseline}, because there are many arms)"
    caption = (
        "Mean over the evaluation seeds at each arm's tuned settings; the bands span the smallest to the largest "
        f"seed{whose}. Dotted: the final loss of {summary.baseline}, which the speed-up refers to. A curve stops where "
        "a seed diverged."
    )
    return Picture(f"{model}-curves.png", f"Validation loss over tokens, {model}", caption), figure


def _sensitivity(summary: Summary, model: str, styles: Mapping[str, Style]) -> Drawn:
    found = summary.sensitivity[model]
    figure = _figure(9.5, max(4.6, 1.2 + 0.21 * len(found)))
    axes = figure.subplots()
    finite = [loss for curve in found.values() for loss in curve.losses if math.isfinite(loss)]
    kept = [min(curve.losses) for curve in found.values() if math.isfinite(min(curve.losses))]
    low = min(finite, default=0.0)
    # Arms and rates with a much higher loss would compress the rest.
    limit = low + OUTLIER * max(statistics.median(kept) - low if kept else 0.0, 1e-3)
    near = [loss for loss in kept if loss <= limit]
    top = max([*near, min(_quantile(finite, 0.85), limit)], default=1.0)
    top += 0.06 * max(top - low, 1e-3)
    for arm, curve in found.items():
        style = styles[arm]
        shown = [min(loss, top) for loss in curve.losses]
        axes.plot(curve.rates, shown, color=style.colour, linestyle=style.dash, linewidth=1.4, zorder=2)
        for rate, loss, y in zip(curve.rates, curve.losses, shown, strict=True):
            marker = style.marker if loss <= top else "^" if math.isfinite(loss) else "x"
            axes.plot(rate, y, marker, color=style.colour, markersize=5, clip_on=False, zorder=3)
            if rate == curve.chosen and math.isfinite(loss):
                axes.plot(rate, y, "o", markersize=11, markerfacecolor="none", markeredgecolor=style.colour, zorder=4)
    axes.set_xscale("log")
    rates = sorted({rate for curve in found.values() for rate in curve.rates})
    if len(rates) <= MAX_TICKS:
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    else:
        log_ticks(axes.xaxis, rates[-1] / rates[0])
    axes.set_ylim(low - 0.06 * max(top - low, 1e-3), top)
    axes.set_xlabel("base learning rate", fontsize=9.5)
    axes.set_ylabel("final loss, mean of tuning seeds (nats per token)", fontsize=9.5)
    frame(axes, "both")
    _legend(figure, list(found), styles, markers=True)
    caption = (
        "Final loss over the base rate, mean of the tuning seeds, with the best of the arm's other tuned settings. "
        "Ringed: chosen. ^ at the upper edge: above the picture; x: diverged."
    )
    return Picture(f"{model}-lr.png", f"Sensitivity to the learning rate, {model}", caption), figure


# ---------------------------------------------------------------------- SNR and alphas


def _snr(summary: Summary, model: str) -> Drawn:
    found = summary.snr[model]
    names = [name for name in ("effective", "mean", "median", "pooled") if any(name in by for by in found.values())]
    figure = _figure(max(6.5, 3.6 * len(names)) + 1.2, 3.1 * len(found) + 0.5)
    grid = figure.subplots(len(found), len(names), squeeze=False, sharex=True, sharey="col")
    groups = group_order(g for by in found.values() for curve in by.values() for g in curve.snr)
    for line, (arm, by) in zip(grid, found.items(), strict=True):
        for axes, name in zip(line, names, strict=True):
            curve = by.get(name)
            for group in group_order(curve.snr) if curve else []:
                assert curve is not None
                # Leave a gap where no seed has a positive reading.
                points = [point or GAP for point in curve.snr[group]]
                low, high = [p.low for p in points], [p.high for p in points]
                colour = colour_of(group)
                axes.plot(curve.steps, [p.mean for p in points], ".-", color=colour, linewidth=1.5, markersize=3)
                axes.fill_between(curve.steps, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axes.set_yscale("log")
            _title(axes, f"{arm}: {name}")
            frame(axes, "both")
        line[0].set_ylabel("SNR, geometric mean", fontsize=9.5)
    for axes in grid[-1]:
        axes.set_xlabel("step", fontsize=9.5)
    handles = [Line2D([], [], color=colour_of(group), linewidth=2.2, label=group) for group in groups]
    marked = "moving weights\ncount as noise;\nrows of unseen\ntokens included"
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9, title=marked, title_fontsize=8)
    caption = (
        "SNR of the gradient by kind of module over training, geometric mean and range over the evaluation seeds. "
        "Read from Adam's moments while the weights move: what this changes in the gradient counts as noise. "
        "Rows of tokens that do not occur are included."
    )
    dropped = [
        f"{arm} {name} {group} {share:.0%}"
        for arm, by in found.items()
        for name, curve in by.items()
        for group, share in curve.dropped.items()
        if share > 0
    ]
    if dropped:
        caption += f" Readings left out because they are not positive: {', '.join(dropped)}."
    return Picture(f"{model}-snr.png", f"SNR over training, {model}", caption), figure


def _alphas(summary: Summary) -> Drawn:
    arms = list(dict.fromkeys(row.arm for row in summary.alphas))
    models = [model for model in summary.models if any(row.model == model for row in summary.alphas)]
    groups = group_order(group for row in summary.alphas for group in row.alphas if group != "other")
    columns = min(4, len(arms))
    lines = math.ceil(len(arms) / columns)
    figure = _figure(max(6.0, 1.6 + 3.2 * columns), 2.9 * lines + 0.4)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes, arm in zip(grid.flat, arms, strict=False):
        _alpha_panel(axes, [row for row in summary.alphas if row.arm == arm], models, groups)
        _title(axes, arm)
    for axes in grid.flat[len(arms) :]:
        axes.set_visible(False)
    ends = [end for row in summary.alphas for band in row.alphas.values() for end in (band.low, band.high)]
    grid[0, 0].set_yscale("log")
    log_ticks(grid[0, 0].yaxis, max(ends) / min(ends))
    for axes in grid[:, 0]:
        axes.set_ylabel("alpha, geometric mean", fontsize=9.5)
    handles = [
        Line2D([], [], color=PALETTE[i % len(PALETTE)], marker=MARKERS[i % len(MARKERS)], label=model)
        for i, model in enumerate(models)
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    caption = "Alphas by kind of module and model, geometric mean and range over the evaluation seeds."
    return Picture("alphas.png", "Alphas by model", caption), figure


def _alpha_panel(axes: Axes, rows: Sequence[AlphaRow], models: Sequence[str], groups: Sequence[str]) -> None:
    axes.axhline(1.0, color=INK, linewidth=0.9)
    for row in rows:
        index = models.index(row.model)
        shift = 0.16 * (index - (len(models) - 1) / 2)
        places = [i + shift for i, group in enumerate(groups) if group in row.alphas]
        values = [row.alphas[group] for group in groups if group in row.alphas]
        marker, colour = MARKERS[index % len(MARKERS)], PALETTE[index % len(PALETTE)]
        axes.vlines(places, [v.low for v in values], [v.high for v in values], color=colour, linewidth=1.6)
        axes.plot(places, [v.mean for v in values], marker, color=colour, markersize=5)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    frame(axes, "y")


# ---------------------------------------------------------------------- shared


def _figure(width: float, height: float) -> Figure:
    spacing = ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.09)
    return Figure(figsize=(width, height), facecolor="white", layout=spacing)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(textwrap.fill(text, TITLE), fontsize=10, color=INK)


def _legend(figure: Figure, arms: Sequence[str], styles: Mapping[str, Style], markers: bool) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=styles[arm].colour,
            linestyle=styles[arm].dash,
            marker=styles[arm].marker if markers else None,
            markersize=5,
            label=arm,
        )
        for arm in arms
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8.5, handlelength=3.4)


def _limit_y(axes: Axes, values: Sequence[float], share: float = 1.0) -> None:
    """Set limits that include the lower `share` of the finite values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return
    low, high = min(finite), _quantile(finite, share)
    margin = 0.05 * max(high - low, 1e-3)
    axes.set_ylim(low - margin, high + margin)


def _quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of them are; 1 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.floor(share * len(ordered)))] if ordered else 1.0
