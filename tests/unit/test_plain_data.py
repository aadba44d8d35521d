"""Files that users and other programs wrote: every problem with one is a MolsConfigError of one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mols_ds.core.config import MolsConfig
from mols_ds.core.files import read_text
from mols_ds.core.json_text import parse_json, read_json
from mols_ds.core.plain_data import MAX_DEPTH
from mols_ds.errors import MolsConfigError
from mols_ds.report.files import load_report
from mols_ds.training.yaml_text import MAX_VALUES, parse_yaml, read_yaml

READERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: read_text(path, "it"),
    "json": lambda path: read_json(path, "it"),
    "yaml": lambda path: read_yaml(path, "it"),
    "report": load_report,
}
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
"""10^12 values ("billion laughs")."""
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 90)}]\n" for n in range(1, 12))


def fifo(path: Path) -> None:
    os.mkfifo(path)


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "[Nn]o such file"),
    "folder": (lambda path: path.mkdir(), "folder|[Nn]o such file"),
    "pipe": (fifo, "not a regular file"),
    "link to nothing": (lambda path: path.symlink_to("nothing"), "[Nn]o such file"),
    "not UTF-8": (lambda path: path.write_bytes(b'{"a": "\xff"}'), "not UTF-8 text"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_text_file(tmp_path: Path, reader: str, place: str) -> None:
    make, said = PLACES[place]
    make(tmp_path / "file")
    with pytest.raises(MolsConfigError, match=said) as caught:
        READERS[reader](tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_a_name_with_a_nul_byte() -> None:
    with pytest.raises(MolsConfigError, match="it: embedded null"):
        read_text("a\0b", "it")
    with pytest.raises(MolsConfigError, match=r'report_dir: must be the name of a folder, .*"?a\\x00b'):
        MolsConfig.parse({"report_dir": "a\0b"})


JSONS = {
    "": "not JSON",
    "\0": "not JSON",
    "[" * 100_000: "nested too deeply",
    "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1): "nested too deeply",
    '{"a": 1, "b": {"c": 1, "c": 2}}': "'c' is there twice",
    "1" * 5000: "not JSON",
    '{"a": [1, {"b": -' + "1" * 30 + "}]}": '"a.1.b": an integer of',
}
YAMLS = {
    "[" * 3000: "nested too deeply",
    "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1): "nested too deeply",
    "a: &a [*a]": "nested too deeply",
    "a: 1\na: 2": "'a' is there twice",
    "1: a\ntrue: b": "is there twice",
    BOMB: f"more than {MAX_VALUES:,} values",
    "a: " + "1" * 5000: "not YAML",
    "a: " + "1" * 30: "integer of",
    "a: \0": "not YAML",
    "a: 2001-99-99": "not YAML",
    "? [a]\n: 1": "not YAML",
    "a: &a {x: 1}\nb: {<<: [" + "*a, " * 101 + "]}": "<< names more than",
    "!!python/object/apply:os.system [ls]": "not YAML",
    "!!set [a]": "not YAML",
}


@pytest.mark.parametrize("number", range(len(JSONS)))
def test_bad_json(number: int) -> None:
    text, said = list(JSONS.items())[number]
    with pytest.raises(MolsConfigError, match=f"^here: .*{said}"):
        parse_json(text, "here")


@pytest.mark.parametrize("number", range(len(YAMLS)))
def test_bad_yaml(number: int) -> None:
    text, said = list(YAMLS.items())[number]
    with pytest.raises(MolsConfigError, match=f"^here: .*{said}"):
        parse_yaml(text, "here")


def test_good_ones_are_what_they_say() -> None:
    content = {"a": [1, 2.5, None, True, "x"], "b": {"c": -(2**62)}}
    assert parse_json(json.dumps(content), "here") == content == parse_yaml(json.dumps(content), "here")
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "here")
    text = "a: &a {x: 1e-3, y: 2}\nb: {<<: *a, y: 3}\nc: *a"
    both = {"x": 1e-3, "y": 2}
    assert parse_yaml(text, "here") == {"a": both, "b": {"x": 1e-3, "y": 3}, "c": both}


def test_nested_merges_take_no_time() -> None:
    found = parse_yaml(MERGES, "here")
    assert isinstance(found, dict) and found["a11"] == {"x": 1}


def test_a_section_that_holds_itself() -> None:
    rules: list[object] = []
    rules.append(rules)
    with pytest.raises(MolsConfigError, match=r'^the "mols" section: nested too deeply'):
        MolsConfig.parse({"rules": rules})
    with pytest.raises(MolsConfigError, match=r'^the "mols" section: "mols.samples": an integer of'):
        MolsConfig.parse({"samples": 10**400})


def test_a_long_wrong_value_is_shown_by_its_ends() -> None:
    with pytest.raises(MolsConfigError) as caught:
        MolsConfig.parse({"mode": "x" * 100_000})
    assert len(str(caught.value)) < 500
