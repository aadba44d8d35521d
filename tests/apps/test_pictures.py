"""Every picture: no text is cut at its edge or lies over other text's panel, no legend lies over what is drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

from mols_ds import cli
from mols_ds.apps.plan import plot as plan_plot
from mols_ds.apps.study.figures import draw as draw_study
from mols_ds.apps.study.summary import summarise
from mols_ds.core.schema import NUMBERS, Report
from mols_ds.report.plot import draw_report
from mols_ds.training.compare import SMOOTHING, draw_curves
from tests.helpers.pages import ROOT
from tests.unit.study_results import study

LONG = "adam_with_a_name_that_nobody_would_give_an_arm"
EDGE = 2.0
"""Pixels that anti-aliasing may add."""


def out_of_view(axes: Axes) -> Iterator[Text]:
    """Labels of ticks beyond the limits, which are not drawn."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if not axes.get_visible() or not axes.axison or not low <= tick.get_loc() <= high:
                yield from (tick.label1, tick.label2)


def faults(figure: Figure) -> Iterator[str]:
    FigureCanvasAgg(figure).draw()
    whole = figure.bbox.padded(EDGE)
    hidden = {id(label) for axes in figure.axes for label in out_of_view(axes)}
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and id(text) not in hidden:
            box = text.get_window_extent()
            if not (whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1):
                yield f"{text.get_text()!r} is cut"
    for legend in figure.findobj(Legend):
        for axes in figure.axes:
            if legend.get_window_extent().overlaps(axes.bbox):
                yield f"a legend lies over {axes.get_title()!r}"
    titles = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
    if any(a.overlaps(b) for i, a in enumerate(titles) for b in titles[:i]):
        yield "titles lie over each other"


def plan_of(tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    cluster = str(ROOT / "configs/clusters/h100_8x80.yaml")
    cli.main(["plan", *arguments, "--cluster", cluster, "--json", "--plot", str(tmp_path / "plan.png")])
    assert (tmp_path / "plan.png").stat().st_size > 1000
    return cast(dict[str, Any], json.loads(capsys.readouterr().out))


@pytest.mark.tier("all")
@pytest.mark.parametrize("nodes", ["8", "64"])
def test_the_plan_of_mixtral(nodes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs/megatron/mixtral_8x7b_tp2_pp4_ep8.yaml")
    plan = plan_of(tmp_path, capsys, "--config", config, "--nodes", nodes)
    figure = plan_plot.draw(plan)
    assert list(faults(figure)) == []
    assert "46,702,792,704 weights" in figure.get_suptitle()


@pytest.mark.tier("all")
def test_the_plan_of_an_offloaded_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, config = ROOT / "configs/models/llama_7b.json", ROOT / "configs/ds_7b_zero3_offload.json"
    figure = plan_plot.draw(plan_of(tmp_path, capsys, str(model), "--config", str(config), "--steps", "1000"))
    assert list(faults(figure)) == []
    assert [axes.get_title() for axes in figure.axes] == ["accelerator", "host"]


def test_the_curves_of_two_arms_say_that_they_are_averages(tmp_path: Path) -> None:
    for arm in ("adam", "mols"):
        (tmp_path / arm).mkdir()
        lines = [{"step": step, "loss": 8.0, "val_loss": 8.1} for step in range(1, 40)]
        (tmp_path / arm / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    figure = draw_curves(tmp_path, {"adam": "Adam", "mols": "Adam + MoLS"})
    assert list(faults(figure)) == []
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:2] == [f"Adam, training: mean of {SMOOTHING} logged steps", "Adam, held out"]


@pytest.mark.parametrize("layers", [1, 24])
def test_the_report_of_a_calibration(layers: int) -> None:
    row: dict[str, Any] = {**dict.fromkeys(NUMBERS, 0.5), "elements": 10**9, "clamped": False, "never_moved_share": 0.1}
    kinds = ("embedding", "head", "qk", "vo", "mlp", "router", "experts", "other")
    names = (
        [kind for kind in kinds for _ in range(1)]
        if layers == 1
        else [f"{k}.{i}" for k in kinds for i in range(layers)]
    )
    groups = {name: {**row, "snr": 0.1 * math.exp(i % 7), "alpha": 0.5 + i % 3} for i, name in enumerate(names)}
    world = dict.fromkeys(("data", "tensor", "pipeline", "expert", "context"), 1024)
    versions = dict.fromkeys(
        ("python", "mols-ds", "torch", "deepspeed", "megatron-core", "transformer-engine"), "2.13.0+cu130"
    )
    known = {"schema": 1, "step": 100_000, "samples": 4096, "world": world, "versions": versions, "groups": groups}
    known |= {"mode": "moments", "estimator": "damping", "reference": "a_group_with_a_long_name_of_a_users_rule"}
    assert list(faults(draw_report(cast(Report, known)))) == []


@pytest.mark.tier("all")
def test_the_pictures_of_a_study() -> None:
    arms = {f"{LONG}_{i}" + "+mols" * (i % 2): {"a": 3.5 + i / 50, f"mixtral_{LONG}": 4.0} for i in range(9)}
    results = study({"adam": {"a": 4.0, f"mixtral_{LONG}": 4.0}, **arms}, diverged=[("a", f"{LONG}_2", 3)])
    drawn = list(draw_study(summarise(results)))
    assert len(drawn) == 8
    assert [(picture.file, fault) for picture, figure in drawn for fault in faults(figure)] == []
