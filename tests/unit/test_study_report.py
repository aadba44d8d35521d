"""The report of a study: its files, their format and their content."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mols_ds.apps.study.document import Picture
from mols_ds.apps.study.paired import Difference
from mols_ds.apps.study.report import COMMAND, write_report
from mols_ds.apps.study.runs import Chosen, StudyResults, StudyRun
from mols_ds.apps.study.summary import summarise
from mols_ds.errors import MolsConfigError, MolsWarning
from tests.unit.study_results import study

ARMS = {"adam": {"a": 4.0, "b": 3.0}, "adam+mols": {"a": 3.9, "b": 2.95}, "lion": {"a": 4.2}}
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
TEXTS = ["report.md", "report.html", "table.csv", "results.csv", "summary.json"]
PICTURES = [
    "forest.png",
    "a-curves.png",
    "b-curves.png",
    "a-lr.png",
    "b-lr.png",
    "a-snr.png",
    "b-snr.png",
    "alphas.png",
]
MINE = "mols-ds compare my.yaml --out runs/my"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of a finished study with one diverged run."""
    out = tmp_path_factory.mktemp("report")
    (out / "study.json").write_text(json.dumps({"study": {}, "machine": {"cores": 2}, "versions": {"torch": "2.13"}}))
    paths = write_report(study(ARMS, diverged=[("a", "lion", 2)]), out, MINE)
    assert sorted(paths) == sorted(out / name for name in [*TEXTS, *PICTURES])
    assert sorted(os.listdir(out)) == sorted(["study.json", *(path.name for path in paths)]), (
        "nothing half-written stays behind"
    )
    return out


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the text alone: pictures take most of the time."""
    monkeypatch.setattr("mols_ds.apps.study.report._draw", lambda _: ({}, []))


def tables(text: str) -> list[tuple[str, list[list[str]]]]:
    """The Markdown tables, head first, each with the paragraph above it."""
    found = []
    for block in re.finditer(r"([^\n]*)\n\n((?:\|[^\n]*\n?)+)", text):
        lines = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in block[2].strip().splitlines()]
        found.append((block[1], [[cell.strip() for cell in line] for line in (lines[0], *lines[2:])]))
    return found


def test_tables_are_whole_and_stand_below_their_command(written: Path) -> None:
    text = (written / "report.md").read_text("utf-8")
    found = tables(text)
    # Two results, two tunings, alphas, settings, arms.
    assert len(found) == 7
    for above, (head, *rows) in found:
        assert above == f"`{MINE}`"
        assert rows and all(len(row) == len(head) for row in rows)
    head, adam, mols, lion = found[0][1]
    cells = dict(zip(head, mols, strict=True))
    assert cells["arm"] == "adam+mols" and cells["tuned settings"] == "lr 0.002" and cells["loss"] == "3.9000"
    assert re.fullmatch(r"\*\*-0\.1000 \[-0\.10\d\d, -0\.09\d\d\]\*\*", cells["minus the baseline"])
    assert cells["perplexity"] == "49.40 (47.47 to 50.86)"
    assert cells["won"] == "5/5" and cells["speed-up"] == "1.03 (0.85)" and cells["step time"] == "~1.00 [1.00, 1.00]"
    assert dict(zip(head, adam, strict=True))["minus the baseline"] == "baseline"
    cells = dict(zip(head, lion, strict=True))
    assert cells["loss"] == cells["minus the baseline"] == "diverged" and cells["speed-up"] == "-"
    assert cells["notes"] == "diverged with 1 of 5 seeds (2)" and cells["won"] == "0/5"
    assert found[2][1][1] == ["adam", "4.1000", "**4.0000**", "4.1000"]
    assert found[4][1][1][:5] == ["adam+mols", "a", "1,000", "5", "4.30 [4.10, 4.50]*"]
    assert "not complete" not in text and "the intervals are unreliable" not in text
    assert "With diverged runs: lion on a." in text
    assert '| machine | {"cores": 2} |' in text and '| versions | {"torch": "2.13"} |' in text
    assert all(f"]({name})" in text and (written / name).read_bytes().startswith(PNG_MAGIC) for name in PICTURES)


class Reader(HTMLParser):
    """Collect tags and attributes, and check that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_one_sound_file_that_asks_for_nothing(written: Path) -> None:
    text = (written / "report.html").read_text("utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    images = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(images) == len(PICTURES)
    assert all((i["src"] or "").startswith("data:image/png;base64,") and i["alt"] for i in images)
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "embed", "form"}
    links = [attributes["href"] or "" for tag, attributes in reader.tags if tag == "a"]
    anchors = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert links and all(link[1:] in anchors and link[0] == "#" for link in links)
    assert len(set(anchors)) == len(anchors)
    assert not re.search(r"https?:|url\(|@import", re.sub(r'src="data:[^"]*"', "", text))
    assert "prefers-color-scheme: dark" in text and text.count(MINE) == 7
    assert "**" not in text.replace(text[: text.index("<body>")], "")


@pytest.mark.usefixtures("undrawn")
def test_users_words_are_escaped(tmp_path: Path) -> None:
    results = study(ARMS)
    results.study["about"] = '<script>alert("x")</script>'
    results.study["arms"]["lion"]["about"] = "a | b\nc <b>"
    results.study["data"] = {"source": "/corpora/private/texts", "tokenizer": None}
    write_report(results, tmp_path)
    page, text = ((tmp_path / name).read_text("utf-8") for name in ("report.html", "report.md"))
    assert "<script" not in page and "<b>" not in page and "&lt;script&gt;" in page
    assert "a \\| b c <b>" in text
    assert "/corpora/private" not in page + text, "of a path, the name alone"
    assert COMMAND in text


def test_csv_and_json_hold_the_same_numbers(written: Path) -> None:
    results = study(ARMS, diverged=[("a", "lion", 2)])
    summary = summarise(results)
    with (written / "results.csv").open(encoding="utf-8", newline="") as file:
        runs = list(csv.DictReader(file))
    assert len(runs) == len(results.runs)
    assert sum(r["diverged"] == "1" for r in runs) == 1 and {r["tuning"] for r in runs} == {"0", "1"}
    for record in runs:
        run = StudyRun(record["model"], record["arm"], (("lr", float(record["lr"])),), int(record["seed"]))
        loss = results.runs[run]["val_loss"]
        assert record["val_loss"] == ("inf" if loss is None else repr(loss)), "every digit is there"
        assert record["evaluation"] == str(int(run.seed > 0))
        assert bool(record["alpha_embedding"]) == (run.arm == "adam+mols")
    with (written / "table.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    read = json.loads((written / "summary.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert read["command"] == MINE
    assert len(table) == len(read["rows"]) == len(summary.rows)
    for record, content, row in zip(table, read["rows"], summary.rows, strict=True):
        assert (record["model"], record["arm"]) == (content["model"], content["arm"]) == (row.model, row.arm)
        assert float(record["loss_mean"]) == row.mean
        if row.difference is not None and row.difference.low is not None:
            assert float(record["difference_low"]) == content["difference"]["low"] == row.difference.low
            assert float(record["p_holm"]) == content["adjusted"] == row.adjusted
        assert json.loads(record["values"]) == content["values"] == row.values


@pytest.mark.usefixtures("undrawn")
def test_unfinished_studies_say_so_first(tmp_path: Path) -> None:
    results = study(ARMS, seeds=(0, 1, 2), rates=(1e-3,))
    for seed in (1, 2):
        gone = StudyRun("a", "lion", (("lr", 1e-3),), seed)
        del results.runs[gone]
        results.missing.append(gone)
    del results.chosen["b", "adam+mols"]
    results.chosen["b", "adam"] = results.chosen["b", "adam"]._replace(edge=True)
    write_report(results, tmp_path)
    text = (tmp_path / "report.md").read_text("utf-8")
    first = text[: text.index("## In short")]
    assert "**This study is not complete**: 2 missing runs can start now." in first
    assert "- `adam+mols` on b: 0 runs, its tuning is not finished\n" in first
    assert "- `lion` on a: 2 runs (lr 0.001 seed 1; lr 0.001 seed 2)\n" in first
    assert "**Fewer than 5 evaluation seeds** (1): the intervals are unreliable." in first
    assert "1 of 3 seeds were run" in text and "+0.2000" in text, "one pair has a difference, but no interval"
    assert "evaluation seeds too, for all arms alike: 0." in text and "for adam on b." in text


@pytest.mark.usefixtures("undrawn")
def test_a_partial_study_answers_what_it_can_and_names_what_is_missing(tmp_path: Path) -> None:
    losses = {"adam": {"a": 4.0, "b": 3.0}, "mols": {"a": 3.8, "b": 3.0}, "constant": {"a": 3.9}, "search": {"a": 3.7}}
    results = study(losses)
    results.study["arms"]["constant"]["models"] = None
    results.study |= {"primary": ["mols", "constant"], "secondary": ["mols", "adam"], "searched": "search"}
    results.study["models"]["long"] = {}
    results.study["changes"] = {"long": {"settings_of": "a", "best": 2}}
    write_report(results, tmp_path)
    text = (tmp_path / "report.md").read_text("utf-8")
    first = text[: text.index("## In short")]
    assert "- `constant` on b: 0 runs, its tuning is not finished\n" in first and "not complete" in first
    assert "- every arm on long: it trains the best arms of a, where not every arm is finished\n" in first
    asked = text[text.index("## The questions") : text.index("## Share of")]
    assert "| primary | a | mols | constant | **-0.1" in asked and "| yes |" in asked
    assert "| primary | b | mols | constant | no result yet | - | - | - |" in asked
    shares = text[text.index("## Share of") : text.index("## Final validation")]
    assert "| a | mols | **-0.2" in shares and "67% [" in shares and "| b |" not in shares
    assert "### long\n\nNothing was tuned here: every arm has its settings on a.\n" in text
    assert "comparisons of this study but the primary and the secondary one" in text


def test_an_empty_study_has_a_report(tmp_path: Path) -> None:
    results = study(ARMS)
    results.runs, results.chosen = {}, {}
    paths = write_report(results, tmp_path)
    assert [path.name for path in paths] == TEXTS
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "no result of the baseline `adam` yet" in text and "No arm has been tuned on this model yet." in text
    assert "No arm has a result on this model yet." in text
    assert "No comparison with the baseline has an interval" in text


def test_without_matplotlib_all_but_the_pictures_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mols_ds.apps.study.figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(MolsWarning, match=r"pictures of the report were not drawn.*pip install matplotlib"):
        paths = write_report(study(ARMS), tmp_path)
    assert sorted(path.name for path in paths) == sorted(os.listdir(tmp_path)) == sorted(TEXTS)
    assert ".png)" not in (tmp_path / "report.md").read_text("utf-8")
    assert "<img" not in (tmp_path / "report.html").read_text("utf-8")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(MolsConfigError, match=r"taken.*--out") as caught:
        write_report(study(ARMS), tmp_path / "taken")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- pictures


def drawn(results: StudyResults) -> dict[str, tuple[Picture, Any]]:
    pytest.importorskip("matplotlib")
    from mols_ds.apps.study.figures import draw

    return {picture.file: (picture, figure) for picture, figure in draw(summarise(results))}


def test_pictures_show_the_numbers() -> None:
    results = study(ARMS)
    summary = summarise(results)
    figures = drawn(results)
    left, right = figures["forest.png"][1].axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["adam+mols", "lion"]
    assert [left.get_title(), right.get_title()] == ["a", "b"]
    difference = summary.of("a")[1].difference
    assert isinstance(difference, Difference)
    interval, point = left.lines[1:3]  # after the line at zero
    assert list(interval.get_xdata()) == [difference.low, difference.high]
    assert list(point.get_xdata()) == [difference.mean]
    assert right.texts[0].get_text().strip() == "not run"
    (axes,) = figures["a-lr.png"][1].axes
    assert axes.get_xscale() == "log" and list(axes.lines[0].get_ydata()) == [4.1, 4.0, 4.1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.001", "0.002", "0.004"]
    whole, _ = figures["a-curves.png"][1].axes
    assert list(whole.lines[0].get_ydata()) == [point.mean for point in summary.of("a")[0].curve.loss]
    snr = figures["a-snr.png"][1].axes
    assert [axes.get_title() for axes in snr] == ["adam+mols: effective", "adam+mols: median"]
    assert all(axes.get_yscale() == "log" for axes in snr)
    assert list(snr[0].lines[0].get_ydata()) == pytest.approx([0.01, 0.005])
    assert list(snr[1].lines[0].get_ydata()) == pytest.approx([0.01, math.nan], nan_ok=True)
    assert "adam+mols median embedding 50%, adam+mols median vo 50%" in figures["a-snr.png"][0].caption
    legend = figures["a-curves.png"][1].legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["adam", "adam+mols", "lion"]


def test_every_one_of_many_arms_looks_different() -> None:
    pytest.importorskip("matplotlib")
    from mols_ds.apps.study.figures import arm_styles

    arms = ["adam", *(f"adam+mols-{x}" for x in "abcdefg"), "lion", "lion+mols", *(f"x{i}" for i in range(17))]
    styles = arm_styles(arms, "adam")
    assert len({(style.colour, str(style.dash)) for style in styles.values()}) == len(arms) == 27
    assert styles["lion"].colour == styles["lion+mols"].colour != styles["adam"].colour


@pytest.mark.parametrize("case", ["diverged", "one rate, one seed", "alike", "outlier", "no alphas", "all infinite"])
def test_pictures_of_awkward_studies(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mols_ds.apps.study.report.DPI", 30)  # the time goes into the pixels
    one = {"adam": {"a": 4.0}, "lion+mols": {"a": 4.1}}
    many = {"adam": {"a": 4.0}, **{f"x{i}": {"a": 4.0 + 0.01 * i} for i in range(20)}, "far": {"a": 9.0}}
    gone = [("a", arm, seed) for arm in one for seed in range(6)]
    results = {
        "diverged": lambda: study(one, diverged=gone[:2]),
        "one rate, one seed": lambda: study(one, seeds=(1,), rates=(1e-3,)),
        "alike": lambda: study({"adam": {"a": 4.0}, "other": {"a": 4.0}}, seeds=(4,), tune_seeds=(4,)),
        "outlier": lambda: study(many),
        "no alphas": lambda: study({"adam": {"a": 4.0}}),
        "all infinite": lambda: study(one, diverged=gone),
    }[case]()
    if case == "all infinite":
        best = (("lr", 2e-3),)
        results.chosen = {key: Chosen(best, chosen.losses, True) for key, chosen in results.chosen.items()}
    paths = write_report(results, tmp_path)
    assert all(path.stat().st_size for path in paths)
    assert {"a-lr.png", "a-curves.png"} <= {path.name for path in paths}
    if case == "outlier":
        texts = [text.get_text() for text in drawn(results)["forest.png"][1].axes[0].texts]
        assert texts == ["+5.000"], "it stands at the edge with its number, so that the others can be read"
