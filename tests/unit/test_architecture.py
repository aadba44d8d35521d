"""The picture of the architecture: drawn from the code, the same each time."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("grimp")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs/draw_architecture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_every_layer_is_drawn_and_described(drawing: ModuleType) -> None:
    layers = drawing.layers()
    assert layers[0] == "mols_ds.cli" and layers[-1] == "mols_ds.errors"
    assert set(layers) <= set(drawing.ABOUT)
    packages = {path.parent.name for path in (ROOT / "mols_ds").glob("*/__init__.py")} - {"plan"}  # a shim
    assert {f"mols_ds.{name}" for name in packages} <= set(layers)


def test_arrows_go_down_and_lines_add_up(drawing: ModuleType) -> None:
    rows = drawing.rows()
    order = [row.name for row in rows]
    for row in rows:
        assert all(order.index(name) > order.index(row.name) for name in row.imports)
        place = drawing.place(row.name)
        files = set(place.rglob("*.py")) if place.is_dir() else {place}
        if row.name in drawing.SPLIT:
            files.discard(place / "__init__.py")  # in no box
        assert sum(box.lines for box in row.boxes) == sum(file.read_text("utf-8").count("\n") for file in files)
    assert rows[order.index("mols_ds.core")].imports == {}
    assert rows[order.index("mols_ds.report")].imports.keys() == {"mols_ds.core"}


def test_the_picture_is_the_same_each_time(drawing: ModuleType, tmp_path: Path) -> None:
    drawing.draw(tmp_path / "one.png")
    drawing.draw(tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
