"""Draws docs/img/architecture.png from the code: the layers, their packages with line counts, who imports whom.

    make architecture        (or: python docs/draw_architecture.py [PATH])

The layers are those of the import-linter contract in pyproject.toml, the imports those that grimp finds, inside
functions and for type checkers too. The same code gives the same picture. Needs the dev and report extras.
"""

from __future__ import annotations

import argparse
import textwrap
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grimp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs/img/architecture.png"
PACKAGES = ("mols_ds", "megatron_patches")
SPLIT = ("mols_ds.apps", "mols_ds.engines")
"""Layers with a box for each of their packages; the others are one box that names its modules."""
ABOUT = {
    "mols_ds.cli": ("the command mols-ds", "#4C566A"),
    "mols_ds.apps": ("independent programs", "#0072B2"),
    "mols_ds.training": ("what the programs share", "#56B4E9"),
    "mols_ds.integrations": ("other people's trainers", "#785EF0"),
    "mols_ds.engines": ("adapters", "#009E73"),
    "megatron_patches": ("adapter of Megatron-core", "#8CB369"),
    "mols_ds.optim": ("optimizers by name", "#B07AA1"),
    "mols_ds.report": ("renders the report", "#E69F00"),
    "mols_ds.core": ("the method", "#D55E00"),
    "mols_ds.errors": ("errors and warnings", "#7F7F7F"),
}
"""Layer -> what it holds, its colour."""
INK, FAINT, PALE = "#222222", "#777777", "#F7F7F7"
LEFT, RIGHT, ROW_GAP, BOX_GAP = 2.45, 11.6, 0.2, 0.1  # inches
LINE, HEAD, SLOT = 0.16, 0.44, 0.135
LANE = 0.11  # between two arrows that run down side by side
NAMES_AT = 118  # letters of module names across a whole row
EVERYWHERE = "mols_ds.errors"
"""What every layer imports: arrows to it would say nothing."""


@dataclass
class Box:
    """One package: its modules' names without that of the package, its lines of code."""

    name: str
    modules: list[str]
    lines: int


@dataclass
class Row:
    """One layer: its box or boxes, `imports`: lower layer -> number of imports from one module to another, and the
    heights at which the arrow to or from another layer touches it."""

    name: str
    boxes: list[Box]
    imports: Counter[str] = field(default_factory=Counter)
    top: float = 0.0
    height: float = 0.0
    leaves: dict[str, float] = field(default_factory=dict)
    enters: dict[str, float] = field(default_factory=dict)


# ------------------------------------------------------------------ what the code says


def layers() -> list[str]:
    """From top to bottom; optional ones, in brackets, only where they exist. Shims at the root are left out."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    (contract,) = (c for c in settings["contracts"] if c["type"] == "layers")
    names = [entry.strip("()") for entry in contract["layers"] if ":" not in entry]
    return [name for name in names if place(name).exists()]


def place(module: str) -> Path:
    """The folder of a package or the file of a module."""
    path = ROOT.joinpath(*module.split("."))
    return path if path.is_dir() else path.with_suffix(".py")


def box(module: str) -> Box:
    path = place(module)
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    lines = sum(file.read_text("utf-8").count("\n") for file in files)
    names = [file.relative_to(path).with_suffix("").as_posix() for file in files if path.is_dir()]
    names = [name for name in names if not name.endswith("__init__")]
    return Box(module.removeprefix("mols_ds.").rpartition(".")[2], names, lines)


def rows() -> list[Row]:
    """The layers with their boxes and imports."""
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=False, cache_dir=None)
    names = layers()
    found = []
    for name in names:
        children = sorted(child for child in graph.find_children(name)) if name in SPLIT else [name]
        found.append(Row(name, [box(child) for child in children]))
    layer_of = {module: name for name in names for module in {name, *graph.find_descendants(name)}}
    for importer, layer in layer_of.items():
        for imported in graph.find_modules_directly_imported_by(importer):
            other = layer_of.get(imported, layer)
            if other not in (layer, EVERYWHERE):
                found[names.index(layer)].imports[other] += 1
    return found


# ------------------------------------------------------------------ the picture


def draw(path: Path) -> None:
    """Write the picture as PNG."""
    every = rows()
    at = 0.62
    for row in every:
        _place(row, at, every)
        at += row.height + ROW_GAP
    width, height = RIGHT + 0.95 + LANE * sum(len(row.imports) for row in every) / 2, at + 0.35
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    total = sum(one.lines for row in every for one in row.boxes)
    head = f"mols-ds: {total:,} lines of Python in {len(every)} layers; a module imports from lower layers only"
    axes.text(0.25, 0.36, head, fontsize=13, fontweight="bold", color=INK)
    for row in every:
        _row(axes, row, *ABOUT[row.name])
    _arrows(axes, every)
    note = (
        "Arrows: imports from module to module between two layers; the number counts them. Every layer imports errors."
    )
    axes.text(0.25, height - 0.16, note, fontsize=8.5, color=FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _place(row: Row, top: float, every: Sequence[Row]) -> None:
    """Give a row its height and its arrows their places: those from above first, the nearest layer's on top; then its
    own, the one that goes farthest on top. So few of them cross."""
    arriving = [other.name for other in reversed(every) if row.name in other.imports]
    leaving = [other.name for other in reversed(every) if other.name in row.imports]
    lines = 2 if row.name in SPLIT else len(text_of(row.boxes[0]))
    slots = len(arriving) + len(leaving)
    row.top, row.height = top, max(HEAD + LINE * lines, SLOT * (slots + 1))
    heights = [top + row.height * (slot + 1) / (slots + 1) for slot in range(slots)]
    row.enters = dict(zip(arriving, heights, strict=False))
    row.leaves = dict(zip(leaving, heights[len(arriving) :], strict=True))


def text_of(one: Box) -> list[str]:
    """The module names of a box that is as wide as a row."""
    # A no-break space keeps each dot behind its name.
    return textwrap.wrap("\u00a0· ".join(one.modules), NAMES_AT, break_on_hyphens=False)


def _row(axes: Axes, row: Row, words: str, colour: str) -> None:
    middle = row.top + row.height / 2
    axes.text(0.25, middle - 0.02, row.name, fontsize=10.5, fontweight="bold", color=colour, va="bottom")
    axes.text(0.25, middle + 0.03, words, fontsize=8.5, color=FAINT, va="top")
    share = (RIGHT - LEFT - BOX_GAP * (len(row.boxes) - 1)) / len(row.boxes)
    for number, one in enumerate(row.boxes):
        x = LEFT + number * (share + BOX_GAP)
        style = f"round,pad=0,rounding_size={0.06}"
        axes.add_patch(
            FancyBboxPatch((x, row.top), share, row.height, style, facecolor=PALE, edgecolor=colour, linewidth=1.4)
        )
        if row.name in SPLIT:
            modules = f"{len(one.modules)} modules" if len(one.modules) > 1 else "1 module"
            axes.text(x + 0.1, row.top + 0.26, one.name, fontsize=8.5, fontweight="bold", color=INK)
            axes.text(x + 0.1, row.top + 0.46, f"{one.lines:,} lines", fontsize=8, color=INK)
            axes.text(x + 0.1, row.top + 0.64, modules, fontsize=7.8, color=FAINT)
            continue
        axes.text(x + 0.12, row.top + 0.28, one.name, fontsize=10.5, fontweight="bold", color=INK)
        axes.text(RIGHT - 0.12, row.top + 0.28, f"{one.lines:,} lines", fontsize=9, color=INK, ha="right")
        for line, text in enumerate(text_of(one)):
            axes.text(x + 0.12, row.top + HEAD + LINE * line + 0.03, text, fontsize=7.8, color=FAINT)


def _arrows(axes: Axes, every: Sequence[Row]) -> None:
    """One arrow on the right from a layer to each lower one that it imports, each in a lane of its own."""
    wanted = [
        (lower - upper, row.leaves[other.name], other.enters[row.name], row, other)
        for upper, row in enumerate(every)
        for lower, other in enumerate(every)
        if other.name in row.imports
    ]
    lanes: list[list[tuple[float, float]]] = []  # the heights that are taken
    for _, start, end, row, other in sorted(wanted, key=lambda arrow: arrow[:2]):
        free = (n for n, taken in enumerate(lanes) if all(end < low - 0.1 or start > high + 0.1 for low, high in taken))
        lane = next(free, len(lanes))
        lanes += [[]] if lane == len(lanes) else []
        lanes[lane].append((start, end))
        _arrow(axes, (start, end, RIGHT + 0.62 + LANE * lane), ABOUT[row.name][1])
        frame = {"boxstyle": "square,pad=0.12", "facecolor": "white", "edgecolor": "none"}
        text = str(row.imports[other.name])
        axes.text(RIGHT + 0.3, end + 0.028, text, fontsize=6.5, color=INK, ha="center", bbox=frame)


def _arrow(axes: Axes, way: tuple[float, float, float], colour: str) -> None:
    """From the height `way[0]` down to `way[1]`, by the distance `way[2]`."""
    start, end, reach = way
    bend = min(0.2, (end - start) / 2, reach - RIGHT)
    points = [(RIGHT, start), (reach - bend, start), (reach, start), (reach, start + bend), (reach, end - bend)]
    points += [(reach, end), (reach - bend, end), (RIGHT + 0.02, end)]
    codes = [Curve.MOVETO, Curve.LINETO, Curve.CURVE3, Curve.CURVE3, Curve.LINETO]
    codes += [Curve.CURVE3, Curve.CURVE3, Curve.LINETO]
    arrow = FancyArrowPatch(
        path=Curve(points, codes), arrowstyle="-|>,head_length=4,head_width=2", color=colour, linewidth=1.3, alpha=0.85
    )
    axes.add_patch(arrow)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the layers of the code.")
    parser.add_argument("path", nargs="?", type=Path, default=PICTURE, help="PNG to write (default: docs/img/)")
    draw(parser.parse_args().path)


if __name__ == "__main__":
    main()
