"""docs/config.md: the keys are those of the code, with the code's types, defaults and descriptions."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from mols_ds.core.config import MolsConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/config.md"


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_config", ROOT / "docs/write_config.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(writer: ModuleType) -> None:
    text = PAGE.read_text("utf-8")
    assert writer.page(text) == text, "run `make docs-config`"


def test_every_key_is_on_the_page() -> None:
    headings = [line.removeprefix("### ") for line in PAGE.read_text("utf-8").splitlines() if line.startswith("### ")]
    assert headings == list(MolsConfig.model_fields)


def test_a_changed_default_and_a_lost_description_are_noticed(
    writer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PAGE.read_text("utf-8")
    schema = MolsConfig.model_json_schema()
    schema["properties"]["samples"]["default"] = 33
    monkeypatch.setattr(writer.MolsConfig, "model_json_schema", lambda: schema)
    assert writer.page(text) != text
    del schema["properties"]["samples"]["description"]
    with pytest.raises(SystemExit, match='"samples" has no docstring'):
        writer.page(text)


def test_a_page_without_the_two_marks_is_refused(writer: ModuleType) -> None:
    with pytest.raises(SystemExit, match="not both there"):
        writer.page("# Keys\n")
