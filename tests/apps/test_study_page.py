"""The HTML report of a study in a real browser: it fits 1200 pixels, every picture loads, no script error."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mols_ds.apps.study.report import write_report
from mols_ds.apps.study.runs import StudyResults
from tests.unit.study_results import study

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH = 1200
FIRST = "<script>window.found = []; addEventListener('error', e => found.push(String(e.message)), true);</script>"
LAST = """<script>addEventListener('load', () => {
  const wide = [...document.querySelectorAll('body, .scroll')].filter(e => e.scrollWidth > e.clientWidth);
  const measured = document.createElement('pre');
  measured.id = 'measured';
  measured.textContent = JSON.stringify({
    page: document.documentElement.scrollWidth, width: innerWidth,
    wide: wide.map(e => `${e.scrollWidth} of ${e.clientWidth}: ${e.textContent.slice(0, 80)}`),
    images: [...document.images].map(i => [i.alt, i.complete, i.naturalWidth, i.getBoundingClientRect().right]),
    errors: window.found});
  document.body.append(measured);
});</script>"""
"""What measures the page; it is put into a copy, since the page itself has no script."""


def wide() -> StudyResults:
    """A dozen arms with notes, memory, long names and several tuned settings."""
    arms = {"adam": {"mixtral-8x7b": 3.5}}
    for i in range(11):
        name = f"arm_{i}_with_a_long_name" + "+mols" * (i % 2)
        arms[name] = {"mixtral-8x7b": 3.5 + 0.03 * math.sin(7 * i + 1)}
    results = study(arms, tune_seeds=(0, 1), rates=tuple(1e-4 * 2**i for i in range(9)))
    for run, result in results.runs.items():
        result["weights"] = 46_702_792_704
        result["memory"] = {"peak": 10**9 + run.seed, "accumulators": 5e8}
    results.chosen = {
        key: chosen._replace(values=(*chosen.values, ("params.rank", 128), ("mols.estimator", "damping")))
        for key, chosen in results.chosen.items()
    }
    for run in list(results.runs):
        if run.values == (("lr", 2e-4),):
            chosen = results.chosen[run.model, run.arm]
            results.runs[replace(run, values=chosen.values)] = results.runs[run]
    return results


def unfinished() -> StudyResults:
    """A few seeds, one arm not tuned, one that diverged."""
    results = study({"adam": {"a": 4.0, "b": 3.0}, "lion+mols": {"a": 4.1, "b": 3.1}}, seeds=(1, 2))
    del results.chosen["b", "lion+mols"]
    results.missing += [run for run in results.runs if run.model == "b" and run.arm == "lion+mols"]
    return results


def measured(page: Path, folder: Path) -> dict[str, Any]:
    """What a browser window of WIDTH pixels makes of the page."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no browser here: apt-get install chromium")
    text = page.read_text("utf-8").replace("<head>", f"<head>{FIRST}", 1)
    copy = folder / "copy.html"
    copy.write_text(text.replace("</body>", f"{LAST}</body>"), "utf-8")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={WIDTH},900", "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert ":CONSOLE" not in done.stderr, "the page logged something"
    block = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert block, done.stderr
    return {**json.loads(html.unescape(block[1]))}


@pytest.mark.tier("all")
@pytest.mark.parametrize("make", [wide, unfinished], ids=lambda make: make.__name__)
def test_the_page_fits_1200_pixels_and_every_picture_loads(
    make: Callable[[], StudyResults], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("mols_ds.apps.study.report.DPI", 30)  # the time goes into the pixels
    files = write_report(make(), tmp_path)
    found = measured(tmp_path / "report.html", tmp_path)
    assert found["width"] == WIDTH
    assert found["page"] <= WIDTH
    assert found["wide"] == []
    assert found["errors"] == []
    assert len(found["images"]) == sum(path.suffix == ".png" for path in files) > 1
    for name, complete, pixels, right in found["images"]:
        assert name and complete and pixels > 50 and right <= WIDTH


@pytest.mark.tier("all")
def test_the_measurement_sees_a_wide_table_a_lost_picture_and_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    body = '<div class="scroll" style="overflow-x:auto"><table style="width:1500px"><tr><td>x</table></div>'
    body += '<img src="gone.png" alt="gone"><script>nothing()</script><p style="width:1600px">x'
    page.write_text(f"<!DOCTYPE html><html><head></head><body>{body}</body></html>", "utf-8")
    with pytest.raises(AssertionError, match="logged something"):
        measured(page, tmp_path)
    page.write_text(page.read_text("utf-8").replace("<script>nothing()</script>", ""), "utf-8")
    found = measured(page, tmp_path)
    assert found["page"] > 1500
    assert len(found["wide"]) == 2 and found["wide"][1].startswith("1500 of")
    assert found["images"][0][2] == 0
