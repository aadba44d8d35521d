"""The report file, its text table and its picture."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mols_ds.errors import MolsConfigError, MolsError, MolsWarning
from mols_ds.report.files import JSON_NAME, PLOT_NAME, load_report, write_report
from mols_ds.report.table import MAX_ROWS, format_report, group_rows

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def group(elements: int, snr: float | None, alpha: float | None = 1.0, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "elements": elements,
        "snr": snr,
        "snr_mean": None if snr is None else 3 * snr,
        "snr_median": snr,
        "snr_pooled": snr,
        "damping": 0.1,
        "snr_low": None if snr is None else snr * 0.9,
        "snr_high": None if snr is None else snr * 1.1,
        "alpha": alpha,
        "never_moved_share": 0.25,
        "moved_once_share": 0.01,
        "clamped": False,
    }
    return {**row, **more}


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "schema": 1,
        "step": 96,
        "samples": 32,
        "mode": "probe",
        "estimator": "median",
        "reference": "vo",
        "groups": {
            "embedding": group(600, 0.015, 10.0, clamped=True),
            "head": group(200, None, 1.0, never_moved_share=1.0),
            "vo": group(200, 0.25),
        },
        "world": {"data": 2, "tensor": 1, "pipeline": 1, "expert": 1},
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
    }


def layered(report: dict[str, Any], layers: int) -> dict[str, Any]:
    groups = {"embedding": group(1000, 0.01, 4.0)}
    groups |= {
        f"{kind}.{i}": group(10 + i, 0.1 * (i + 1), 1.0 / (i + 1)) for i in range(layers) for kind in ("qk", "vo")
    }
    return {**report, "reference": "vo.1", "groups": groups}


def test_round_trip_is_equal_by_file_and_by_folder(report: dict[str, Any], tmp_path: Path) -> None:
    path = write_report(report, tmp_path / "made" / "here")
    assert path == tmp_path / "made" / "here" / JSON_NAME
    assert load_report(path) == load_report(path.parent) == report
    assert (path.parent / PLOT_NAME).read_bytes().startswith(PNG_MAGIC)
    assert sorted(entry.name for entry in path.parent.iterdir()) == [JSON_NAME, PLOT_NAME]


def test_numbers_that_are_not_finite_become_null(report: dict[str, Any], tmp_path: Path) -> None:
    report["groups"]["vo"] |= {"snr": math.nan, "snr_low": -math.inf, "snr_mean": math.inf}
    text = write_report(report, tmp_path).read_text()
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [read["groups"]["vo"][key] for key in ("snr", "snr_low", "snr_mean")] == [None, None, None]


def test_a_failed_write_keeps_the_old_report(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(report, tmp_path)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(MolsConfigError, match=r"report_dir.*No space left on device") as caught:
        write_report({**report, "step": 97}, tmp_path)
    assert "\n" not in str(caught.value)
    assert load_report(tmp_path)["step"] == 96
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [JSON_NAME, PLOT_NAME]


def test_report_dir_that_is_a_file(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(MolsConfigError, match="report_dir"):
        write_report(report, tmp_path / "taken")


def test_without_matplotlib_warns_and_writes_the_numbers(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "mols_ds.report.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(MolsWarning, match=r"mols_report\.png was not drawn.*pip install matplotlib"):
        write_report(report, tmp_path)
    assert load_report(tmp_path) == report
    assert not (tmp_path / PLOT_NAME).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("schema"), "'schema' is absent"),
        (lambda r: r.update(schema=2), "'schema' is 2"),
        (lambda r: r.update(step="96"), "'step' is '96', not of type int"),
        (lambda r: r.update(samples=True), "'samples' is True"),
        (lambda r: r.update(groups={}), "'groups' is empty"),
        (lambda r: r.update(groups={"vo": 1.0}), r"groups\['vo'\] is 1.0"),
        (lambda r: r["groups"]["vo"].pop("alpha"), "has no 'alpha'"),
        (lambda r: r["groups"]["vo"].update(alpha="1"), "'alpha'. is '1', not a number or null"),
        (lambda r: r["groups"]["vo"].update(elements=-1), "is -1, not a count"),
        (lambda r: r["groups"]["vo"].update(clamped=None), "not a bool"),
        (lambda r: r.pop("world"), "'world' is absent"),
    ],
)
def test_foreign_reports_are_refused_in_one_line(
    report: dict[str, Any], tmp_path: Path, change: Any, message: str
) -> None:
    change(report)
    path = tmp_path / "other.json"
    path.write_text(json.dumps(report))
    with pytest.raises(MolsConfigError, match=message) as caught:
        load_report(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    with pytest.raises(MolsError, match=message):
        write_report(report, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["groups"]["vo"].update(alpha=math.inf), r"groups\['vo'\]\['alpha'\] is inf"),
        (lambda r: r["groups"]["vo"].update(alpha=math.nan), r"groups\['vo'\]\['alpha'\] is nan"),
        (lambda r: r["groups"]["vo"].update(alpha=0.0), r"'alpha'\] is 0.0, not a finite number above 0"),
        (lambda r: r["groups"]["vo"].update(alpha=-2), r"'alpha'\] is -2"),
        (lambda r: r["groups"]["vo"].update(snr=math.nan), r"groups\['vo'\]\['snr'\] is nan, not a finite number"),
        (lambda r: r["groups"]["vo"].update(alpha_high=math.inf), r"\['alpha_high'\] is inf"),
        (lambda r: r.update(samples=-1), r"'samples' is -1"),
        (lambda r: r.update(step=-1), r"'step' is -1"),
    ],
)
def test_bad_numbers_in_a_report_that_is_read(
    report: dict[str, Any], tmp_path: Path, change: Any, message: str
) -> None:
    change(report)
    (tmp_path / JSON_NAME).write_text(json.dumps(report))
    with pytest.raises(MolsConfigError, match=message) as caught:
        load_report(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [ValueError("no backend\n'nonsense'"), RuntimeError("no font"), AttributeError("x")])
def test_a_picture_that_fails_is_one_warning_and_the_numbers_are_written(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("mols_ds.report.plot.draw_report", fail)
    with pytest.warns(MolsWarning, match=rf"mols_report\.png was not drawn \({type(error).__name__}: ") as said:
        write_report(report, tmp_path)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    assert load_report(tmp_path) == report


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize("content", [DEEP, b"", b'{"schema": 1', b"\xff\xfe\x00", b"[]", b"null"])
def test_damaged_reports_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / JSON_NAME).write_bytes(content)
    with pytest.raises(MolsConfigError, match=JSON_NAME) as caught:
        load_report(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_report_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(MolsConfigError, match=r"absent\.json.*cannot be read"):
        load_report(tmp_path / "absent.json")


def test_format_has_a_line_for_each_group(report: dict[str, Any]) -> None:
    lines = format_report(report).splitlines()
    assert lines[0] == "MoLS at step 96: 32 gradient samples, mode probe, estimator median, reference vo"
    body = [line.split() for line in lines[4:]]
    assert body[0] == ["embedding", "600", "60.0%", "0.0150", "0.0135", "..", "0.0165", "10.0", "25.0%", "clamped"]
    assert body[1] == ["head", "200", "20.0%", "-", "-", "1.00", "100.0%"]
    assert body[2] == ["vo", "200", "20.0%", "0.250", "0.225", "..", "0.275", "1.00", "25.0%", "reference"]
    assert max(map(len, lines)) <= 100


def test_format_heads_the_statistic_of_damping_d(report: dict[str, Any]) -> None:
    assert " SNR " in format_report(report)
    assert " SNR " not in format_report({**report, "estimator": "damping"})
    assert " d " in format_report({**report, "estimator": "damping"})


def test_format_says_that_nothing_was_measured(report: dict[str, Any]) -> None:
    assert "fixed_alphas, no measurement" in format_report({**report, "mode": "fixed"})
    failed = format_report({**report, "failed": "no usable sample"})
    assert "calibration FAILED, no usable sample" in failed


def test_many_groups_are_joined_by_kind(report: dict[str, Any]) -> None:
    many = layered(report, MAX_ROWS)
    rows = {row.name: row for row in group_rows(many)}
    assert list(rows) == ["embedding", "qk", "vo"]
    assert rows["qk"].layers == MAX_ROWS
    assert rows["qk"].elements == sum(10 + i for i in range(MAX_ROWS))
    assert rows["qk"].snr == (0.1, pytest.approx(0.1 * MAX_ROWS))
    assert rows["qk"].interval == (None, None)
    assert rows["qk"].never_moved == pytest.approx(0.25)
    assert [row.reference for row in rows.values()] == [False, False, True]
    assert sum(row.share for row in rows.values()) == pytest.approx(1.0)
    assert len(group_rows(layered(report, 2))) == 5, "few groups stay apart"


def awkward_reports(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Reports whose plots once could fail: values that a logarithmic axis has no place for, one group, many groups."""
    negative, empty, alone = copy.deepcopy(report), copy.deepcopy(report), copy.deepcopy(report)
    negative["groups"]["vo"] |= {"snr": -0.01, "snr_low": -0.02, "snr_high": -0.001}
    for row in empty["groups"].values():
        row |= {"snr": None, "snr_low": None, "snr_high": None, "alpha": None}
    alone["groups"] = {"vo": group(0, 0.0, 0.1, snr_low=0.0, snr_high=0.0)}
    return {
        "negative": negative,
        "empty": empty,
        "alone": alone,
        "alpha interval": {
            **report,
            "groups": {"vo": group(9, 0.2, alpha_low=1.0, alpha_high=1.0), "mlp": group(9, 0.1, 1.4, alpha_low=None)}
            | {"qk": group(9, 0.4, 0.7, alpha_low=0.6, alpha_high=0.8)},
        },
        "damping": {**report, "estimator": "damping"},
        "layers": layered(report, 40),
    }


@pytest.mark.parametrize("case", ["negative", "empty", "alone", "alpha interval", "damping", "layers"])
def test_plot_of_awkward_reports(report: dict[str, Any], tmp_path: Path, case: str) -> None:
    awkward = awkward_reports(report)[case]
    write_report(awkward, tmp_path)
    assert (tmp_path / PLOT_NAME).read_bytes().startswith(PNG_MAGIC)
    assert format_report(awkward)


def test_plot_shows_what_the_report_says(report: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    from mols_ds.report.plot import colour_of, draw_report

    figure = draw_report(report)
    left, right, below = figure.axes
    assert left.get_xscale() == right.get_xscale() == "log"
    assert [tick.get_text() for tick in left.get_yticklabels()] == list(report["groups"])
    bars = {round(bar.get_y() + bar.get_height() / 2): bar for bar in right.patches}
    assert [bars[i].get_x() + bars[i].get_width() for i in range(3)] == pytest.approx([10.0, 1.0, 1.0])
    assert [bool(bars[i].get_hatch()) for i in range(3)] == [True, False, False]
    cells = below.tables[0].get_celld()
    assert [cells[row, 0].get_text().get_text() for row in range(4)] == ["group", *report["groups"]]
    assert colour_of("qk.3") == colour_of("qk") != colour_of("vo")
