"""Names from outside cannot do anything to a terminal or a log: they are printed as escapes, on their own line."""

from __future__ import annotations

import io
import re
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import pytest

from mols_ds.apps.doctor.findings import Findings
from mols_ds.apps.study.document import Picture, markdown
from mols_ds.apps.study.page import page
from mols_ds.apps.study.summary import summarise
from mols_ds.core.log import GuardedWriter, say, tell, warn_here
from mols_ds.core.schema import NUMBERS, Report
from mols_ds.errors import MolsConfigError, MolsWarning, printable, printable_lines
from mols_ds.report.table import format_report
from mols_ds.training.cli_utils import print_line
from tests.unit.study_results import study

EVIL = "a\x1b[31m\x07\u202eb\nmols-ds: all is well\r\x9b2J\u2028\ud800\x00"


def harmless(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


def test_escapes() -> None:
    assert printable("a\x1b[0m\tb\n c") == "a\\x1b[0m b c"
    assert printable("Größe 5 µm — 漢") == "Größe 5 µm — 漢"
    assert printable("\u202e\ud800\x9b") == "\\u202e\\ud800\\x9b"
    assert printable_lines("a   b\n\x1b") == "a   b\n\\x1b"
    assert printable(EVIL).isprintable()


def test_errors_and_warnings_are_one_harmless_line() -> None:
    assert str(MolsConfigError(f"rule {EVIL}")).isprintable()
    with pytest.warns(MolsWarning) as caught:
        warnings.warn(f"rule {EVIL}", MolsWarning, stacklevel=1)
    assert str(caught[0].message).isprintable()


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    tell(f"group {EVIL}")
    say(f"group {EVIL}")
    print_line("train.py", EVIL)
    out, err = capsys.readouterr()
    assert harmless(out) and harmless(err)
    assert err.count("\n") == 1


def test_a_report_from_elsewhere() -> None:
    row: dict[str, Any] = dict.fromkeys(NUMBERS, 0.5)
    groups = {name: {**row, "elements": 8, "clamped": False} for name in ("qk", "vo")}
    known = {"schema": 1, "step": 1, "samples": 4, "world": {}, "versions": {}, "groups": groups}
    report = cast(Report, known)
    report["groups"][EVIL] = report["groups"].pop("qk")
    report["mode"] = report["estimator"] = report["reference"] = EVIL
    text = format_report(report)
    assert harmless(text) and len(text.splitlines()) == 4 + len(report["groups"])


def test_findings_of_the_doctor() -> None:
    findings = Findings()
    findings.add("problem", "config", EVIL, EVIL)
    assert harmless(findings.as_text()) and harmless("\n".join(findings._plain()))


def test_the_page_of_a_study() -> None:
    words = EVIL + "<script>![x](http://a.b/c.png) [x](javascript:d) <http://a.b> &lt;"
    results = study({"adam": {words: 4.0}, words + "+mols": {words: 3.9}}, seeds=(1,))
    results.study |= {"name": words, "about": words, "data": {"source": words}}
    results.study["arms"][words + "+mols"]["about"] = words
    results.missing += [run for run in results.runs if run.arm != "adam"]
    text = markdown(summarise(results), results.study, words, [Picture("a.png", words, words)])
    assert harmless(text) and "\nmols-ds" not in text
    html = page(text, {"a.png": b"1"})
    assert harmless(html) and "<script" not in html and "&amp;lt;" in html
    assert not re.search(r"(src|href)=\"(?!data:image/png;base64,MQ==\"|#)", html)


def test_a_terminal_without_unicode() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    tell("Größe", file)
    file.seek(0)
    assert file.read() == "Gr\\xf6\\xdfe\n"


class Broken:
    encoding = "utf-8"

    def write(self, text: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    flush = write


@pytest.mark.parametrize("broken", [Broken(), None])
def test_telling_never_raises(monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    monkeypatch.setattr(sys, "stdout", broken)
    monkeypatch.setattr(sys, "stderr", broken)
    tell("x")
    say("x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_here("x")


def test_a_warning_of_one_rank_is_printed_where_warnings_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_here("no picture")
    assert capsys.readouterr().err == "MolsWarning: no picture\n"
    with pytest.warns(MolsWarning, match="no picture") as caught:
        warn_here("no picture")
    assert Path(caught[0].filename).name == Path(__file__).name


def test_what_is_written_aside_warns_once() -> None:
    def fail() -> None:
        raise RuntimeError("disk full")

    guarded = GuardedWriter()
    with pytest.warns(MolsWarning, match=r"metrics: not written \(RuntimeError: disk full\)") as caught:
        assert [guarded("metrics", fail), guarded("metrics", fail), guarded("metrics", list)] == [False, False, True]
    assert len(caught) == 1
